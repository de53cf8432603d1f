"""Drives an engine to its end and keeps what came out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from executor_svc.core.engine import (
    LeaseFailure,
    LeaseRequest,
    PromptScores,
    SamplingParams,
    SequenceEnd,
    StepOutput,
)
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.resident import ResidentModel

MODEL = "tiny"


def build(folder: Path, **settings: Any) -> TorchEngine:
    """An engine on one thread: a second one costs tiny products more than it gives."""
    settings = {"kv_bytes": 1 << 22, "num_threads": 1} | settings
    return TorchEngine(EngineConfig(models=((MODEL, str(folder)),), **settings))


def only(engine: TorchEngine) -> ResidentModel:
    """The one model of an engine that has one."""
    (model,) = engine._resident.values()
    return model


def lease(
    key: int, prompt: Sequence[int], params: SamplingParams | None = None, **fields: Any
) -> LeaseRequest:
    params = params or SamplingParams(max_tokens=8)
    return LeaseRequest(key=key, model=MODEL, prompt_token_ids=prompt, params=params, **fields)


@dataclass(slots=True)
class Record:
    """All outputs of an engine, by sequence key."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    indices: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, SequenceEnd] = field(default_factory=dict)
    failures: dict[int, LeaseFailure] = field(default_factory=dict)
    num_cached: dict[int, int] = field(default_factory=dict)  # by lease key
    scores: dict[int, PromptScores] = field(default_factory=dict)  # by lease key
    tops: dict[int, list[list[tuple[int, float]]]] = field(default_factory=dict)
    num_steps: int = 0

    def take(self, output: StepOutput) -> None:
        self.num_steps += 1
        for scores in output.prompt_scores:
            assert scores.key not in self.tokens.keys() | self.scores.keys(), "late or told twice"
            self.scores[scores.key] = scores
        if output.num_top:
            tops = iter(zip(output.top_token_id, output.top_logprob, strict=True))
            for key, num_top in zip(output.key, output.num_top, strict=True):
                self.tops.setdefault(key, []).append(list(islice(tops, num_top)))
            assert next(tops, None) is None
        rows = zip(output.key, output.index, output.token_id, output.logprob, strict=True)
        for key, index, token_id, logprob in rows:
            assert key not in self.ends, "a token after the end"
            self.tokens.setdefault(key, []).append(token_id)
            self.logprobs.setdefault(key, []).append(logprob)
            self.indices.setdefault(key, []).append(index)
        for end in output.ends:
            assert end.key not in self.ends, "two ends"
            self.ends[end.key] = end
        self.failures |= {failure.key: failure for failure in output.failures}
        assert not self.num_cached.keys() & output.num_cached.keys(), "told twice"
        self.num_cached |= output.num_cached


def run(engine: TorchEngine, *leases: LeaseRequest) -> Record:
    """Add all leases, step until nothing is left."""
    for one in leases:
        engine.add(one)
    record = Record()
    while engine.has_work():
        record.take(engine.step())
    for model in engine._resident.values():
        assert model._batcher.blocks.num_free == model._batcher.blocks.num_blocks
        assert not model._rows
    return record
