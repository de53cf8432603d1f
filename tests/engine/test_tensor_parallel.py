"""A model divided over processes, on gloo: the same tokens as of one process."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.core.engine import LeaseRequest, ModelLoadError, PromptScoring, SamplingParams
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.model_config import load_spec
from executor_svc.torch_engine.models.sharding import Shard
from executor_svc.torch_engine.models.tensors import tensor_shapes
from executor_svc.torch_engine.tensor_parallel import Group, Plan, RankDiedError
from tests.engine.driving import Record, lease, run

NAMES = ("qwen3", "llama-tied", "qwen2-window", "qwen3-moe")
MAX_DIFFERENCE = 1e-4
PROMPT = [(7 * i) % 300 + 3 for i in range(90)]
PARAMS = SamplingParams(max_tokens=10, seed=5, ignore_eos=True)
GREEDY = replace(PARAMS, temperature=0)


def _leases(name: str) -> list[LeaseRequest]:
    """Several prompts and ways to draw; the first one's prompt is scored."""
    scoring = PromptScoring(wants_logprobs=True)
    leases = [
        lease(0, PROMPT, GREEDY, scoring=scoring),
        lease(10, PROMPT[:31], PARAMS, num_samples=2),
        lease(20, PROMPT[5:7], replace(PARAMS, top_logprobs=3)),
        lease(30, PROMPT[20:21], GREEDY),
    ]
    return [replace(one, model=name) for one in leases]


@contextmanager
def _engine(folders: dict[str, Path], names: tuple[str, ...], **settings: Any) -> Iterator[Any]:
    defaults = {"kv_bytes": 1 << 22, "num_threads": 1, "max_num_batched_tokens": 50}
    models = tuple((name, str(folders[name])) for name in names)
    engine = TorchEngine(EngineConfig(models=models, **(defaults | settings)))
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _pair(folders: dict[str, Path], names: tuple[str, ...], **settings: Any) -> Iterator[Any]:
    with _engine(folders, names, tensor_parallel_size=2, **settings) as engine:
        yield engine


def _child(engine: TorchEngine) -> Any:
    assert engine._ranks is not None
    ((process, _),) = engine._ranks._children
    return process


def _assert_same(one: Record, two: Record) -> None:
    assert one.tokens == two.tokens
    pairs: list[Any] = [(one.logprobs[key], two.logprobs[key]) for key in one.logprobs]
    pairs += [(one.scores[key].logprob[1:], two.scores[key].logprob[1:]) for key in one.scores]
    for expected, found in pairs:
        assert torch.allclose(torch.tensor(expected), torch.tensor(found), atol=MAX_DIFFERENCE)


def test_two_processes_give_the_tokens_of_one(checkpoints: dict[str, Path]) -> None:
    """All families that differ in what is divided; and a model that leaves and comes back."""
    records = {}
    with _engine(checkpoints, NAMES) as engine:
        context = {model.name: model.max_context_tokens for model in engine.models}
        for name in NAMES:
            records[name] = run(engine, *_leases(name))
    with _pair(checkpoints, NAMES, max_models=1) as engine:
        assert [model.is_resident for model in engine.models] == [True, False, False, False]
        before = None
        for name in (*NAMES, NAMES[0]):
            if before is not None:
                assert engine.load(name, (before,)) >= 0
            _assert_same(records[name], run(engine, *_leases(name)))
            before = name
        # Each rank has half of the heads, so the same memory holds twice as many tokens.
        for model in engine.models:
            assert model.max_context_tokens >= context[model.name]
        child = _child(engine)
    assert not child.is_alive()


def test_a_sequence_goes_on_elsewhere_bit_by_bit(checkpoints: dict[str, Path]) -> None:
    with _pair(checkpoints, ("qwen3",)) as engine:
        alone = run(engine, *_leases("qwen3")[1:2])
        assert engine.models[0].exactness_class
    tokens = [alone.tokens[10], alone.tokens[11]]
    with _pair(checkpoints, ("qwen3",), max_num_seqs=9, max_num_batched_tokens=17) as engine:
        others = [replace(lease(100 + i, PROMPT[i:60], GREEDY), model="qwen3") for i in range(5)]
        resumed = replace(_leases("qwen3")[1], generated=(tokens[0][:4], tokens[1][:7]))
        record = run(engine, *others, resumed)
    assert record.tokens[10] == tokens[0][4:]
    assert record.logprobs[10] == alone.logprobs[10][4:]
    assert record.logprobs[11] == alone.logprobs[11][7:]


def test_two_parts_make_a_whole_tensor(checkpoints: dict[str, Path]) -> None:
    spec = load_spec(checkpoints["qwen3-moe"])
    first, second = Shard(0, 2), Shard(1, 2)
    for name, shape in tensor_shapes(spec).items():
        parts = [first.part(name, shape), second.part(name, shape)]
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        if parts[0] == ():
            assert parts[1] == ()
            assert name.endswith(("norm.weight", "mlp.gate.weight"))
            continue
        dimension = len(parts[0]) - 1
        assert torch.equal(torch.cat([whole[part] for part in parts], dimension), whole)
        local = tensor_shapes(first.spec(spec)) | {
            "model.embed_tokens.weight": (spec.vocab_size // 2, spec.hidden_size),
            "lm_head.weight": (spec.vocab_size // 2, spec.hidden_size),
        }
        assert whole[parts[1]].shape == local[name]
        assert first.part_shape(name, shape) == whole[parts[0]].shape


@pytest.mark.parametrize("size", [3, 4])
def test_a_size_that_does_not_divide_the_model_is_refused(
    checkpoints: dict[str, Path], size: int
) -> None:
    spec = load_spec(checkpoints["qwen3"])  # 4 heads on 2
    name = {3: "vocab_size", 4: "num_key_value_heads"}[size]
    with pytest.raises(ValueError, match=f"tensor_parallel_size: {size} does not divide {name}"):
        Shard(0, size).spec(spec)


def test_an_engine_that_cannot_be_divided_leaves_no_process(checkpoints: dict[str, Path]) -> None:
    folders, started = checkpoints, _num_children()
    config = EngineConfig(
        models=(("qwen3", str(folders["qwen3"])),), tensor_parallel_size=4, num_threads=1
    )
    with pytest.raises(ValueError, match="tensor_parallel_size: 4 does not divide"):
        TorchEngine(config)
    assert _num_children() == started


def _num_children() -> int:
    return len(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_a_rank_that_dies_ends_the_engine_and_not_a_lease(checkpoints: dict[str, Path]) -> None:
    with _pair(checkpoints, ("qwen3",)) as engine:
        for one in _leases("qwen3"):
            engine.add(one)
        engine.step()
        _child(engine).kill()
        _child(engine).join()
        with pytest.raises(RankDiedError, match="rank 1 has ended with status -9"):
            engine.step()
        with pytest.raises(RankDiedError):
            engine.step()


def test_a_rank_that_cannot_load_fails_the_load_only(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _pair(checkpoints, ("qwen3", "llama-tied"), max_models=1) as engine:
        known = engine._residency.models["llama-tied"]
        monkeypatch.setitem(
            engine._residency.models, "llama-tied", replace(known, num_blocks=1 << 40)
        )
        with pytest.raises(ModelLoadError, match="rank 1: "):
            engine.load("llama-tied", ("qwen3",))
        monkeypatch.undo()
        engine.load("qwen3", ())
        assert len(run(engine, *_leases("qwen3")).tokens[0]) == PARAMS.max_tokens


_PARENT = """
import signal
import sys
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine
if __name__ == "__main__":
    # a shell that runs us in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = TorchEngine(
        EngineConfig(models=(("m", sys.argv[1]),), tensor_parallel_size=2, num_threads=1)
    )
    print(engine._ranks._children[0][0].pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_ranks_end_with_their_parent(
    checkpoints: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    with subprocess.Popen(
        [sys.executable, str(script), str(checkpoints["qwen3"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        os.kill(parent.pid, number)
        parent.wait(timeout=60)
        ended, _, _ = select.select([child], [], [], 60)
        os.close(child)
    assert ended, "the rank outlives its parent"


def test_a_plan_survives_the_pipe() -> None:
    plan = Plan([1, 3, 2], [9, 3, 40], [[5, 2], [7], []], [11, 21, 22, 23, 31, 32])
    assert Plan.of_numbers(plan.to_numbers()) == plan
    assert plan.positions().tolist() == [8, 0, 1, 2, 38, 39]


@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_over_ranks_does_not_depend_on_company(tmp_path: Path, size: int) -> None:
    """The ranks are threads here."""
    config = EngineConfig(models=(("m", "m"),), tensor_parallel_size=size)
    store = str(tmp_path / "store")
    torch.manual_seed(2)
    x = torch.randn(size, 65, 64)

    def work(rank: int) -> tuple[Tensor, list[Tensor]]:
        group = Group(config, rank, torch.device("cpu"), store)
        together = group.reduce(x[rank].clone())
        return together, [group.reduce(x[rank, i : i + 1].clone()) for i in range(0, 65, 8)]

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(work, range(size)))
    for together, alone in results:
        assert torch.equal(together, results[0][0])
        assert torch.allclose(together, x.sum(0), atol=1e-5)
        assert torch.equal(torch.cat(alone), together[::8])


@pytest.mark.parametrize("size", [0, -1])
def test_a_senseless_size_is_named(size: int) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1"):
        EngineConfig(models=(("m", "m"),), tensor_parallel_size=size)
