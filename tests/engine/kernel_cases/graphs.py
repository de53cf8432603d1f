"""A whole engine on the kernels, and its decode steps replayed as graphs replay them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from executor_svc.core.engine import SamplingParams
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.graphs import Computed, DecodeGraphs
from tests.engine.checkpoints import make_checkpoint
from tests.engine.driving import build, lease, only, run
from tests.engine.kernel_cases.interpreter import CPU


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3", family="qwen3")


PROMPTS = [[(7 * i) % 300 + 3 for i in range(length)] for length in (1, 5, 19)]
PARAMS = SamplingParams(max_tokens=3, seed=3, ignore_eos=True)


def _engine(model: Path, backend: str, **settings: Any) -> TorchEngine:
    # Without exact mode, since its self-test takes the interpreter half a minute.
    return build(model, attention_backend=backend, exact_mode=False, kv_bytes=1 << 18, **settings)


def test_a_whole_engine_on_triton_equals_the_cpu_one(model: Path) -> None:
    leases = [lease(key, prompt, PARAMS) for key, prompt in enumerate(PROMPTS)]
    ours = run(_engine(model, "triton", max_num_batched_tokens=10, max_num_seqs=4), *leases)
    wanted = run(_engine(model, "cpu"), *leases)
    assert ours.tokens == wanted.tokens
    for key, logprobs in wanted.logprobs.items():
        assert ours.logprobs[key] == pytest.approx(logprobs, abs=1e-5)


class Replays:
    """Graphs, but for CUDA: a replay computes again what was captured, on the same buffers."""

    def __init__(self) -> None:
        self.counts: list[int] = []  # of each graph, in order of their capture

    def __call__(self, compute: Callable[[], Computed]) -> tuple[Computed, Callable[[], None]]:
        number, out = len(self.counts), compute()
        self.counts.append(0)

        def replay() -> None:
            self.counts[number] += 1
            for kept, new in zip(out, compute(), strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)

        return out, replay


def _with_graphs(engine: TorchEngine, max_num_seqs: int) -> Replays:
    runner, replays = only(engine)._runner, Replays()
    runner._graphs = DecodeGraphs(
        runner._model,
        runner._backend,
        runner._staging,
        max_num_seqs=max_num_seqs,
        device=CPU,
        capture=replays,
    )
    runner._graphs.warm_up()
    return replays


@pytest.mark.parametrize("overlaps", [False, True])
def test_replayed_decode_steps_equal_plain_ones(model: Path, *, overlaps: bool) -> None:
    """Greedy rows and rows with cuts, one of which ends at a stop that nobody foresees."""
    stop = run(_engine(model, "cpu"), lease(1, PROMPTS[1], PARAMS)).tokens[1][1]
    params = [
        SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
        replace(PARAMS, stop_token_ids=(stop,)),
        replace(PARAMS, temperature=0.8, top_k=30, top_p=0.9, min_p=0.01),
    ]
    leases = [lease(key, PROMPTS[key], params[key]) for key in range(3)]
    plain = run(_engine(model, "triton"), *leases)
    engine = _engine(model, "triton", max_num_seqs=4, overlap_scheduling=overlaps)
    replays = _with_graphs(engine, 4)
    graphed = run(engine, *leases)
    # Captured were the largest first, each as logits and draws; all steps but the prefill are
    # replayed, of three rows in four, and the last one of two, where the stop was seen in time.
    assert replays.counts == ([2, 2, 0, 0, 0, 0] if overlaps else [1, 1, 1, 1, 0, 0])
    assert graphed.tokens == plain.tokens
    assert len(graphed.tokens[1]) == 2
    for key, logprobs in plain.logprobs.items():
        assert graphed.logprobs[key] == pytest.approx(logprobs, abs=1e-6)


def test_layers_with_and_without_a_window_are_replayed(tmp_path: Path) -> None:
    """Each kind has a plan of its own at an address that stays."""
    window: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    }
    folder = make_checkpoint(tmp_path, family="qwen3", **window)
    leases = [lease(key, prompt, PARAMS) for key, prompt in enumerate(PROMPTS)]
    engine = _engine(folder, "triton", max_num_seqs=4)
    replays = _with_graphs(engine, 4)
    graphed, wanted = run(engine, *leases), run(_engine(folder, "cpu"), *leases)
    assert replays.counts[0] == PARAMS.max_tokens - 1
    assert graphed.tokens == wanted.tokens
    for key, logprobs in wanted.logprobs.items():
        assert graphed.logprobs[key] == pytest.approx(logprobs, abs=1e-5)


def test_rows_that_no_graph_can_draw_are_drawn_after_it(model: Path) -> None:
    wishes = [
        replace(PARAMS, repetition_penalty=1.5),
        replace(PARAMS, top_logprobs=2),
        replace(PARAMS, min_tokens=2, ignore_eos=False),
    ]
    leases = [lease(key, PROMPTS[key], params) for key, params in enumerate(wishes)]
    plain = run(_engine(model, "cpu"), *leases)
    engine = _engine(model, "triton", max_num_seqs=4, overlap_scheduling=True)
    replays = _with_graphs(engine, 4)
    graphed = run(engine, *leases)
    assert graphed.tokens == plain.tokens
    assert replays.counts[0] == PARAMS.max_tokens - 1
    assert sum(replays.counts[1::2]) == 0
