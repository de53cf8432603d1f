"""The CUDA path without a GPU: what it launches fits together, and nothing makes the host wait.

See dry_gpu.py for what such a run can say. What kernels compute is tested in kernel_cases/.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.gpu import right, speed, steps
from bench.gpu.__main__ import run_part
from bench.gpu.shapes import QUICK, SHAPES
from executor_svc.core.engine import LeaseRequest, PromptScoring, SamplingParams
from executor_svc.torch_engine import engine as torch_engine
from executor_svc.torch_engine import tensor_parallel
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.graphs import bucket_sizes
from tests.engine.driving import build, lease, run
from tests.engine.dry_gpu import MAX_SHARED_BYTES, DryGpu, dry_gpu

DEVICE = "cuda:0"
NUM_SEATS = 20
FREE: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True}
# All that a step can be asked for but a grammar, which would rule the one token out that is drawn.
WISHES = {
    "greedy": SamplingParams(temperature=0.0, **FREE),
    "drawn": SamplingParams(seed=1, top_k=20, top_p=0.95, min_p=0.01, **FREE),
    "likeliest": SamplingParams(seed=2, top_logprobs=3, **FREE),
    "banned": SamplingParams(seed=3, max_tokens=4, min_tokens=3, stop_token_ids=(5,)),
    "penalized": SamplingParams(
        seed=4, repetition_penalty=1.3, frequency_penalty=0.2, logit_bias=((3, 1.0),), **FREE
    ),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[DryGpu]:
    with dry_gpu(monkeypatch) as gpu:
        yield gpu


def on_gpu(folder: Path, **settings: Any) -> TorchEngine:
    usual = {"dtype": "bfloat16", "kv_bytes": 1 << 24, "max_num_seqs": NUM_SEATS}
    usual |= {"device": DEVICE, "max_num_batched_tokens": 64}
    return build(folder, **(usual | settings))


def leases(wish: str) -> list[LeaseRequest]:
    """Of different lengths, the last one prefilled in chunks beside the others' decode."""
    return [lease(10 * i, [3] * (5 + 40 * i), WISHES[wish]) for i in range(3)]


def check_steps(gpu: DryGpu, engine: TorchEngine, *, has_graphs: bool = True) -> None:
    """All kinds of wishes come true, and no step waits for the device."""
    for wish in WISHES:
        gpu.clear()
        record = run(engine, *leases(wish))
        assert not record.failures, wish
        assert [len(tokens) for tokens in record.tokens.values()] == [4, 4, 4], wish
        assert gpu.waits == [], wish
        assert (gpu.num_replays > 0) == has_graphs, wish
    assert gpu.num_captures == (2 * len(bucket_sizes(NUM_SEATS)) if has_graphs else 0)
    for launch in gpu.launches:
        assert launch.compiled.asm["cubin"]
        assert launch.compiled.metadata.shared <= MAX_SHARED_BYTES


@pytest.mark.parametrize(
    ("name", "is_exact"), [("qwen3", True), ("llama-tied", False), ("qwen2", False)]
)
def test_a_whole_engine(
    name: str, checkpoints: dict[str, Path], gpu: DryGpu, *, is_exact: bool
) -> None:
    engine = on_gpu(checkpoints[name], exact_mode=is_exact)
    assert engine.attention_backend == "triton"
    assert bool(engine.models[0].exactness_class) == is_exact
    check_steps(gpu, engine)
    assert not gpu.count("_store_kernel")  # it is done with the rotation
    # Else torch's FlashAttention prefills, over keys that were gathered.
    assert (gpu.count("prefill_kernel") > 0) == is_exact


def test_without_graphs(qwen3: Path, gpu: DryGpu) -> None:
    check_steps(gpu, on_gpu(qwen3, enforce_eager=True, exact_mode=False), has_graphs=False)


def test_experts_are_one_product_and_ask_the_host_nothing(
    checkpoints: dict[str, Path], gpu: DryGpu
) -> None:
    engine = on_gpu(checkpoints["qwen3-moe"], exact_mode=False)
    gpu.clear()
    assert not run(engine, *leases("greedy")).failures
    assert gpu.waits == []
    assert "_grouped_mm" in gpu.operations


def test_torchs_flash_attention_for_all(qwen3: Path, gpu: DryGpu) -> None:
    settings = {"exact_mode": False, "block_size": 256, "attention_backend": "torch"}
    check_steps(gpu, on_gpu(qwen3, **settings))
    assert not gpu.count("decode_kernel")


def test_the_flash_attn_package(qwen3: Path, gpu: DryGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that looks at shapes and types as the package's own checks do."""

    def check(keys: Tensor, table: Tensor, *lengths: Tensor) -> None:
        assert keys.shape[1] % 256 == 0
        assert table.is_contiguous()
        for x in (table, *lengths):
            assert x.is_cuda
            assert x.dtype is torch.int32

    def varlen(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        check(k, given["block_table"], given["cu_seqlens_q"], given["cu_seqlens_k"])
        return torch.empty_like(q)

    def with_kvcache(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        check(k, given["block_table"], given["cache_seqlens"])
        assert len(given["block_table"]) == len(given["cache_seqlens"]) == len(q)
        return torch.empty_like(q)

    package: Any = ModuleType("flash_attn")
    package.__version__ = "2.8.3"
    package.__spec__ = object()  # it is installed
    package.flash_attn_varlen_func, package.flash_attn_with_kvcache = varlen, with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.delitem(
        sys.modules, "executor_svc.torch_engine.attention.flash_attn_pkg", raising=False
    )
    engine = on_gpu(qwen3, exact_mode=False, block_size=256)
    assert engine.attention_backend == "flash"
    check_steps(gpu, engine)
    monkeypatch.delitem(sys.modules, "executor_svc.torch_engine.attention.flash_attn_pkg")


def test_models_that_take_turns(checkpoints: dict[str, Path], gpu: DryGpu) -> None:
    names = ("qwen3", "llama")
    models = tuple((name, str(checkpoints[name])) for name in names)
    engine = TorchEngine(EngineConfig(models=models, max_models=1, device=DEVICE, max_num_seqs=4))
    for name, evicted in (("llama", "qwen3"), ("qwen3", "llama")):
        gpu.clear()
        engine.load(name, (evicted,))
        # Weights come from locked memory; of the rest, the angles of positions do not.
        assert len(gpu.waits) == 1
        record = run(engine, replace(lease(0, [3] * 9, WISHES["drawn"]), model=name))
        assert not record.failures


def test_scores_of_prompts(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read at once, which is a wait for each part of a prompt."""
    scoring = PromptScoring(wants_logprobs=True, top_logprobs=2, num_alternatives=1, last_n=9)
    with dry_gpu(monkeypatch, has_answers=True) as gpu:
        engine = on_gpu(qwen3, exact_mode=False)
        gpu.clear()
        record = run(engine, lease(0, [3] * 70, WISHES["greedy"], scoring=scoring))
        assert not record.failures
        assert len(record.scores[0].logprob) == 70
        assert set(gpu.waits) >= {"copy to the device", "copy from the device"}


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen3-8b"])
def test_launches_of_a_layer(shape: str, gpu: DryGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shapes that the GPU report measures: few, and none past what a GPU has."""
    monkeypatch.setattr(steps, "prepare", lambda _: None)
    spec = replace(SHAPES[shape], num_layers=3)
    run = steps.Steps(spec, torch.device(DEVICE), num_sequences=2, context=600, temperature=1.0)
    gpu.clear()
    run.prefill(0)
    counts = [gpu.count(name) for name in ("prefill_kernel", "decode_kernel", "merge_kernel")]
    assert counts == [3, 0, 0]
    assert [gpu.count(f"_{name}_kernel") for name in ("rotate_store", "silu_mul")] == [3, 3]
    assert gpu.count("_rms_norm_kernel") == 2 * 3 + 1
    # What else a layer asks of torch are its four products.
    assert gpu.operations.count("mm") + gpu.operations.count("linear") == 4 * 3 + 1
    assert gpu.waits == []
    for compiled in gpu.kernels.values():
        assert compiled.metadata.shared <= MAX_SHARED_BYTES
    gpu.clear()
    run.decode(2)
    assert gpu.num_replays == 2
    assert gpu.launches == []
    assert gpu.waits == []


class _Group:
    """NCCL's side of a rank, with its checks of what it is given."""

    class Options:
        _timeout: object = None

    def __init__(self, store: object, rank: int, size: int, options: Options) -> None:
        assert options._timeout is not None
        self.calls: list[str] = []

    def _take(self, name: str, *tensors: Tensor) -> "_Group":
        for x in tensors:
            assert x.is_cuda
            assert x.is_contiguous()
        self.calls.append(name)
        return self

    def wait(self) -> None:
        pass

    def allreduce(self, tensors: list[Tensor]) -> "_Group":
        return self._take("allreduce", *tensors)

    def allgather(self, parts: list[list[Tensor]], tensors: list[Tensor]) -> "_Group":
        return self._take("allgather", *parts[0], *tensors)

    def gather(self, parts: list[list[Tensor]], tensors: list[Tensor], _: object) -> "_Group":
        return self._take("gather", *parts[0], *tensors)

    def broadcast(self, tensors: list[Tensor], _: object) -> "_Group":
        return self._take("broadcast", *tensors)


class _Ranks:
    """The other ranks, who agree to everything."""

    def __init__(self, group: tensor_parallel.Group) -> None:
        self.group = group

    def least_kv_bytes(self) -> int:
        return 1 << 24

    def load(self, *_: object) -> None:
        pass

    wait_loaded = forward = logits = close = load

    def death(self, fault: BaseException) -> BaseException:
        return fault


def test_rank_0_of_two(qwen3: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", _Group, raising=False)

    def start(config: EngineConfig) -> Any:
        device, store = torch.device(DEVICE), str(tmp_path / "store")
        return _Ranks(tensor_parallel.Group(config, 0, device, store))

    monkeypatch.setattr(torch_engine, "start_ranks", start)
    # It tells the other ranks which tokens a step has, so it waits for them.
    with dry_gpu(monkeypatch, has_answers=True) as gpu:
        engine = on_gpu(qwen3, tensor_parallel_size=2)
        assert gpu.num_captures == 0  # a graph would leave the others behind
        gpu.clear()
        record = run(engine, *leases("drawn"))
        assert not record.failures
        assert gpu.count("_rotate_store_kernel")
        assert engine._ranks is not None
        calls = engine._ranks.group._group.calls
        assert set(calls) == {"allreduce", "broadcast", "gather"}


@pytest.mark.parametrize(
    "part",
    [
        *("ceilings", "rows", "products:tiny", "products-loose:tiny", "switch"),
        *("prefill:tiny", "decode:tiny", "decode-drawn:tiny"),
    ],
)
def test_parts_of_the_gpu_report(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come to their end on a GPU; what they measure means nothing here."""
    for module in (right, speed, steps):
        monkeypatch.setattr(module, "prepare", lambda _: None)
    monkeypatch.setattr(speed, "_gap", lambda *_: {})  # it wants to see kernels
    limits = {"bytes_per_s": 3e12, "operations_per_s": 8e14, "host_bytes_per_s": 5e10}
    with dry_gpu(monkeypatch, has_answers=True):
        assert run_part(part, torch.device(DEVICE), QUICK, limits)


def test_the_gpu_report_compares_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with dry_gpu(monkeypatch, has_answers=True):
        figures = right._engines_agree(torch.device(DEVICE), QUICK)
    assert figures["difference_to_reference"].keys() >= {"cpu", "triton"}
