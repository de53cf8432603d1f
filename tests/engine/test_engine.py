"""Leases come and go: refusals, aborts, faults that stay with their lease."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from executor_svc.core.engine import InvalidLeaseError, SamplingParams
from executor_svc.torch_engine.engine import TorchEngine
from headway.reasons import Reason
from tests.engine.checkpoints import CHAT_TEMPLATE, edit_weights, make_checkpoint
from tests.engine.driving import Record, build, lease, only, run

PROMPT = [10, 20, 30]
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)


def test_model_info_and_assets(engine: TorchEngine, qwen3: Path) -> None:
    (info,) = engine.models
    assert (info.name, info.family, info.vocab_size) == ("tiny", "qwen3", 320)
    assert (info.max_context_tokens, info.eos_token_ids, info.dtype) == (1024, (2,), "float32")
    assets = engine.assets("tiny")
    assert assets.tokenizer_json == (qwen3 / "tokenizer.json").read_bytes()
    assert assets.chat_template == CHAT_TEMPLATE
    assert assets.generation_config_json
    assert engine.num_slots == 32


def test_digests_name_the_content(qwen3: Path, tmp_path: Path) -> None:
    first, again = build(qwen3).models[0], build(qwen3).models[0]
    other = build(make_checkpoint(tmp_path, seed=1)).models[0]
    assert replace(first, load_ms=None) == replace(again, load_ms=None)
    assert len(first.weights_digest) == len(first.assets_digest) == 64
    assert first.weights_digest != other.weights_digest
    assert first.assets_digest == other.assets_digest


@pytest.mark.parametrize(
    ("params", "fields", "reason"),
    [
        ({"max_tokens": 0}, {}, Reason.INVALID_REQUEST),
        ({"temperature": -1.0}, {}, Reason.INVALID_REQUEST),
        ({"temperature": float("nan")}, {}, Reason.INVALID_REQUEST),
        ({"top_k": -1}, {}, Reason.INVALID_REQUEST),
        ({"top_p": 0.0}, {}, Reason.INVALID_REQUEST),
        ({"min_p": 1.5}, {}, Reason.INVALID_REQUEST),
        ({"min_tokens": -1}, {}, Reason.INVALID_REQUEST),
        ({"stop_strings": ("",)}, {}, Reason.INVALID_REQUEST),
        ({"stop_token_ids": (320,)}, {}, Reason.INVALID_REQUEST),
        ({}, {"prompt_token_ids": []}, Reason.INVALID_REQUEST),
        ({}, {"prompt_token_ids": [320]}, Reason.INVALID_REQUEST),
        ({}, {"prompt_token_ids": [-1]}, Reason.INVALID_REQUEST),
        ({}, {"num_samples": 0}, Reason.INVALID_REQUEST),
        ({}, {"generated": ([1], [2])}, Reason.INVALID_REQUEST),
        ({}, {"generated": ([1] * 11,)}, Reason.INVALID_REQUEST),
        ({}, {"model": "another"}, Reason.MODEL_NOT_FOUND),
        ({"max_tokens": 1022}, {}, Reason.PROMPT_TOO_LONG),
        ({"max_tokens": 1000}, {"prompt_token_ids": range(3, 300)}, Reason.PROMPT_TOO_LONG),
    ],
    ids=str,
)
def test_what_can_never_run_is_refused(
    engine: TorchEngine, params: dict[str, Any], fields: dict[str, Any], reason: Reason
) -> None:
    sampling = SamplingParams(**({"max_tokens": 10} | params))
    with pytest.raises(InvalidLeaseError) as caught:
        engine.add(replace(lease(0, PROMPT, sampling), **fields))
    assert caught.value.reason is reason
    assert not engine.has_work()


def test_a_step_says_what_it_computed(qwen3: Path) -> None:
    """Rows of one token apart from longer chunks; a prompt past the budget takes several steps."""
    engine = build(qwen3, max_num_seqs=4, max_num_batched_tokens=8)
    engine.add(lease(0, [5, 6, 7], PARAMS))
    steps = [engine.step()]
    engine.add(lease(16, list(range(20, 32)), PARAMS))
    steps += [engine.step() for _ in range(3)]
    assert [(step.num_decoded, step.num_prefilled) for step in steps] == [
        *((0, 3), (1, 7), (1, 5), (2, 0))
    ]


def test_what_does_not_fit_the_blocks_is_refused(qwen3: Path) -> None:
    engine = build(qwen3, num_blocks=4, block_size=4)
    assert engine.models[0].max_context_tokens == 16
    with pytest.raises(InvalidLeaseError) as caught:
        engine.add(lease(0, [5] * 7, PARAMS))
    assert caught.value.reason is Reason.PROMPT_TOO_LONG
    assert len(run(engine, lease(0, [5] * 6, PARAMS)).tokens[0]) == 10


def test_abort_frees_blocks_and_silences_the_lease(engine: TorchEngine) -> None:
    blocks = only(engine)._batcher.blocks
    engine.add(lease(0, PROMPT, PARAMS, num_samples=3))
    engine.add(lease(10, PROMPT, PARAMS))
    assert set(engine.step().key) == {0, 1, 2, 10}
    assert blocks.num_free == blocks.num_blocks - 4
    engine.abort(0)
    engine.abort(77)  # never heard of it
    assert blocks.num_free == blocks.num_blocks - 1
    record = Record()
    while engine.has_work():
        record.take(engine.step())
    assert record.tokens.keys() == {10}
    assert record.ends[10].num_tokens == 10
    assert len(run(engine, lease(0, PROMPT, PARAMS)).tokens[0]) == 10  # the key is free again


def test_abort_also_takes_back_ends_that_were_not_told_yet(engine: TorchEngine) -> None:
    engine.add(lease(0, PROMPT, PARAMS, generated=([5] * 10,)))
    assert engine.has_work()
    engine.abort(0)
    assert not engine.has_work()
    assert engine.step().ends == []


def test_close_forgets_everything(engine: TorchEngine) -> None:
    engine.add(lease(0, PROMPT, PARAMS))
    engine.step()
    engine.close()
    assert not engine.has_work()
    assert only(engine)._batcher.blocks.num_free == only(engine)._batcher.blocks.num_blocks


def test_a_fault_in_one_lease_ends_that_lease_only(engine: TorchEngine) -> None:
    whole = run(engine, lease(0, PROMPT, PARAMS), lease(20, PROMPT[:2], PARAMS))
    for key, prompt in ((0, PROMPT), (10, PROMPT), (20, PROMPT[:2])):
        engine.add(lease(key, prompt, PARAMS, num_samples=2 if key == 10 else 1))
    first = engine.step()
    # No lease can come in with such a row; a fault of ours could make one.
    rows = only(engine)._rows
    (sequence,) = (sequence for sequence in rows if sequence.key == 11)
    rows[sequence] = None  # type: ignore[assignment]
    record = Record()
    record.take(first)
    while engine.has_work():
        record.take(engine.step())
    assert record.failures.keys() == {10}
    assert record.failures[10].reason is Reason.INTERNAL
    assert record.tokens[0] == whole.tokens[0]
    assert record.tokens[20] == whole.tokens[20]
    assert only(engine)._batcher.blocks.num_free == only(engine)._batcher.blocks.num_blocks


def test_an_engine_in_which_nothing_runs_dies(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would go on taking leases, to fail each of them for good."""
    engine.add(lease(0, PROMPT, PARAMS))
    engine.add(lease(10, PROMPT, PARAMS))
    engine.step()

    def forward(*_: object) -> None:
        raise RuntimeError("nothing works")

    monkeypatch.setattr(only(engine)._runner._model, "forward", forward)
    with pytest.raises(RuntimeError, match="nothing works"):
        engine.step()


def test_an_engine_that_lost_its_device_dies(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add(lease(0, PROMPT, PARAMS))

    def forward(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(only(engine)._runner._model, "forward", forward)
    with pytest.raises(torch.AcceleratorError):
        engine.step()


@pytest.mark.parametrize(("num_threads", "expected"), [(None, 1), (2, 2)])
def test_small_models_run_on_one_thread(
    qwen3: Path, num_threads: int | None, expected: int
) -> None:
    torch.set_num_threads(3)
    try:
        build(qwen3, num_threads=num_threads)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)


def test_a_fault_after_the_draw_ends_that_lease_only(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add(lease(0, PROMPT, SamplingParams(max_tokens=5, stop_strings=("never ever",))))
    engine.add(lease(10, PROMPT, PARAMS))
    monkeypatch.setattr(only(engine)._arrivals, "_token_bytes", {})  # a KeyError for whoever asks
    record = Record()
    while engine.has_work():
        record.take(engine.step())
    assert record.failures.keys() == {0}
    assert record.ends[10].num_tokens == 10


def test_logits_that_are_not_finite_end_their_lease_only(qwen3: Path, tmp_path: Path) -> None:
    """Token 9's embedding is NaN; its lease's blocks are used again by others afterwards."""
    folder = make_checkpoint(tmp_path)
    edit_weights(folder, lambda weights: weights["model.embed_tokens.weight"][9].fill_(math.nan))

    engine = build(folder, num_blocks=12)
    whole = run(build(qwen3), lease(0, PROMPT, PARAMS), lease(5, [11] * 40, PARAMS))
    sick = [lease(20 + i, [9] * 40, PARAMS) for i in range(3)]
    record = run(engine, *sick, lease(0, PROMPT, PARAMS), lease(5, [11] * 40, PARAMS))
    assert record.failures.keys() == {20, 21, 22}
    assert all("finite" in failure.detail for failure in record.failures.values())
    assert record.tokens == {0: whole.tokens[0], 5: whole.tokens[5]}


def test_more_leases_than_seats_all_end(qwen3: Path) -> None:
    engine = build(qwen3, max_num_seqs=3, max_num_batched_tokens=10, num_blocks=9, block_size=4)
    leases = [lease(key, [3 + key] * (1 + key % 20), PARAMS) for key in range(40)]
    record = run(engine, *leases)
    assert sorted(record.ends) == list(range(40))
    assert not record.failures
