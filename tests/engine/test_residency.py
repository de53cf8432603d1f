"""Several models in one engine: each as exact as alone, and none beyond what fits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from executor_svc.core.engine import InvalidLeaseError, LeaseRequest, ModelLoadError, SamplingParams
from executor_svc.torch_engine import residency
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.host_weights import HostBlock
from executor_svc.torch_engine.known_model import weight_bytes
from executor_svc.torch_engine.model_config import load_spec
from executor_svc.torch_engine.models.sharding import Shard
from headway.reasons import Reason
from tests.engine.driving import Record, build, lease, run
from tests.engine.published_configs import QWEN3_0_6B, QWEN3_30B_A3B

PARAMS = SamplingParams(max_tokens=12, seed=5, ignore_eos=True)
PROMPT = [10, 20, 30]
NAMES = ("qwen3", "llama", "llama-tied")


@pytest.fixture
def make(checkpoints: dict[str, Path]) -> Any:
    def make(*names: str, **settings: Any) -> TorchEngine:
        models = tuple((name, str(checkpoints[name])) for name in names or NAMES)
        settings = {"kv_bytes": 1 << 22, "num_threads": 1} | settings
        return TorchEngine(EngineConfig(models=models, **settings))

    return make


def for_model(name: str, key: int = 0) -> LeaseRequest:
    return replace(lease(key, PROMPT, PARAMS), model=name)


def alone(checkpoints: dict[str, Path], name: str) -> list[int]:
    return run(build(checkpoints[name]), lease(0, PROMPT, PARAMS)).tokens[0]


def resident(engine: TorchEngine) -> set[str]:
    return {model.name for model in engine.models if model.is_resident}


def test_models_side_by_side_are_as_they_are_alone(make: Any, checkpoints: dict[str, Path]) -> None:
    engine = make()
    assert engine.max_models == 3
    assert resident(engine) == set(NAMES)
    record = run(engine, *(for_model(name, 10 * i) for i, name in enumerate(NAMES)))
    assert record.num_steps == PARAMS.max_tokens, "one batch of each model in a step"
    for i, name in enumerate(NAMES):
        assert record.tokens[10 * i] == alone(checkpoints, name)
    with pytest.raises(InvalidLeaseError) as caught:
        engine.add(for_model("another"))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_a_model_that_went_and_came_back_is_the_same(
    make: Any, checkpoints: dict[str, Path]
) -> None:
    engine = make(max_models=1)
    assert resident(engine) == {"qwen3"}
    for name, before in (("llama", "qwen3"), ("qwen3", "llama"), ("llama", "qwen3")):
        assert engine.load(name, (before,)) >= 0
        assert resident(engine) == {name}
        assert run(engine, for_model(name)).tokens[0] == alone(checkpoints, name)


def test_others_go_on_where_they_stood_after_a_load(
    make: Any, checkpoints: dict[str, Path]
) -> None:
    engine = make(max_models=2)
    engine.add(for_model("qwen3"))
    record = Record()
    for _ in range(5):
        record.take(engine.step())
    engine.load("llama-tied", ("llama",))
    engine.add(for_model("llama-tied", 10))
    while engine.has_work():
        record.take(engine.step())
    assert record.tokens[0] == alone(checkpoints, "qwen3")
    assert record.tokens[10] == alone(checkpoints, "llama-tied")


def test_abort_and_close_reach_every_model(make: Any) -> None:
    engine = make()
    for i, name in enumerate(NAMES):
        engine.add(for_model(name, 10 * i))
    engine.abort(10)
    assert set(engine.step().key) == {0, 20}
    engine.close()
    assert not engine.has_work()


def test_the_cache_is_shared_in_equal_parts(make: Any) -> None:
    settings = {"max_num_seqs": 1, "kv_bytes": 1 << 18}
    whole = make("qwen3", **settings).models[0].max_context_tokens
    parts = make(**settings, max_models=2).models
    assert [model.max_context_tokens for model in parts] == [whole // 2] * 3


def test_a_load_time_is_measured_or_told_by_the_size(make: Any) -> None:
    engine = make(max_models=1)
    first, second, _ = engine.models
    assert first.load_ms is not None
    assert second.load_ms is not None, "an estimate"
    took_ms = engine.load("llama", ("qwen3",))
    assert engine.models[1].load_ms == took_ms


def test_memory_that_does_not_suffice_is_told_before_loading(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(max_models=1)
    monkeypatch.setattr(residency, "_free_bytes", lambda device: 1 << 20)
    with pytest.raises(ModelLoadError, match=r"llama: .* need \d+ MiB, 1 MiB are free"):
        engine.load("llama", ("qwen3",))
    assert resident(engine) == set()
    monkeypatch.undo()
    engine.load("llama", ())
    assert resident(engine) == {"llama"}


def test_weights_of_absent_models_make_room(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(max_models=1)
    engine.load("llama", ("qwen3",))
    host = engine._residency._host
    assert set(host) == {"qwen3", "llama"}
    model = engine._residency.models["llama-tied"]
    just_short = model.weight_bytes + model.cache_bytes - 1
    monkeypatch.setattr(residency, "_free_bytes", lambda device: just_short)
    engine.load("llama-tied", ("llama",))
    assert set(host) == {"llama", "llama-tied"}, "the one that was away longest went"


def test_files_that_are_gone_fail_the_load_only(
    make: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    moving = tmp_path / "moving"
    moving.mkdir()
    for file in checkpoints["llama-tied"].iterdir():
        (moving / file.name).write_bytes(file.read_bytes())
    models = (("qwen3", str(checkpoints["qwen3"])), ("moving", str(moving)))
    config = EngineConfig(models=models, max_models=1, kv_bytes=1 << 20, num_threads=1)
    engine = TorchEngine(config)
    (moving / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"moving: .*model\.safetensors"):
        engine.load("moving", ("qwen3",))
    assert engine.load("qwen3", ()) >= 0
    assert len(run(engine, for_model("qwen3")).tokens[0]) == PARAMS.max_tokens


def test_an_engine_that_cannot_load_its_first_models_is_not_built(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "_free_bytes", lambda device: 0)
    with pytest.raises(ModelError, match="0 MiB are free"):
        make()


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("config", "num_parameters", "num_embedding", "num_vectors"),
    [
        (QWEN3_0_6B, 596_049_920, 151_936 * 1024, 28 * (2 * 1024 + 2 * 128) + 1024),
        (QWEN3_30B_A3B, 30_532_122_624, None, None),
    ],
    ids=["Qwen3-0.6B", "Qwen3-30B-A3B"],
)
def test_weights_are_counted_before_they_are_loaded(
    tmp_path: Path,
    config: dict[str, Any],
    num_parameters: int,
    num_embedding: int | None,
    num_vectors: int | None,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_spec(tmp_path)
    whole, half = Shard(), Shard(1, 2)
    on_gpu = weight_bytes(spec, whole, CUDA, "none")
    assert on_gpu == 2 * num_parameters
    # Norms and routers are on both ranks.
    assert on_gpu / 2 <= weight_bytes(spec, half, CUDA, "none") < on_gpu / 2 * 1.01
    if num_embedding is not None and num_vectors is not None:  # the head is tied
        on_cpu = weight_bytes(spec, whole, CPU, "none")
        assert on_cpu == 2 * (num_parameters + num_embedding), "the packed head"
        narrow = num_parameters - num_embedding - num_vectors + num_embedding
        assert weight_bytes(spec, whole, CPU, "int8") == narrow + 2 * (num_embedding + num_vectors)


def test_a_block_of_host_memory_holds_each_tensor_apart() -> None:
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2, 64)}
    block = HostBlock(shapes, torch.bfloat16)
    for i, (name, shape) in enumerate(shapes.items()):
        assert block.tensors[name].shape == shape
        assert block.tensors[name].data_ptr() % 16 == 0
        block.tensors[name].fill_(i)
    assert [tensor.unique().tolist() for tensor in block.tensors.values()] == [[0], [1], [2]]


@pytest.mark.gpu
@pytest.mark.parametrize("max_models", [1, 2])
def test_weights_that_went_to_the_host_come_back_as_they_were(make: Any, max_models: int) -> None:
    engine = make(
        "qwen3", "llama", "qwen3-moe", max_models=max_models, device="cuda", dtype="bfloat16"
    )
    before = run(engine, for_model("qwen3"))
    engine.load("qwen3-moe", ("qwen3",))
    engine.load("qwen3", ("qwen3-moe",))
    assert run(engine, for_model("qwen3")).tokens == before.tokens
