"""Runs one step: chunks in, a token for each chunk that completes its sequence out."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from executor_svc.core.batcher import Chunk
from executor_svc.torch_engine.attention.base import AttentionBackend
from executor_svc.torch_engine.graphs import DecodeGraphs
from executor_svc.torch_engine.host_step import HostStep
from executor_svc.torch_engine.models.decoder import Model
from executor_svc.torch_engine.sampler import Row, Sampled, SamplingBatch, sample
from executor_svc.torch_engine.staging import Staging


class Top(NamedTuple):
    """The likeliest tokens beside one that was drawn, likeliest first."""

    token_ids: list[int]
    logprobs: list[float]


_NO_TOP = Top([], [])


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step drew, one entry for each chunk that is the last of its sequence, in order.

    ``tops`` is empty if no row asked. ``problems`` has, by the number of the entry, why a token
    could not be drawn; the token that stands there means nothing.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)


class Runner:
    """The model, its cache and the buffers of a step."""

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        *,
        block_size: int,
        device: torch.device,
        graphs_up_to: int = 0,
    ) -> None:
        """Decode steps of at most ``graphs_up_to`` sequences run as CUDA graphs."""
        self._model, self._backend = model, backend
        self._block_size, self._device = block_size, device
        self._staging = Staging(device)
        self._graphs: DecodeGraphs | None = None
        self._choose_device()
        if graphs_up_to:
            self._graphs = DecodeGraphs(
                model, backend, self._staging, max_num_seqs=graphs_up_to, device=device
            )
            self._graphs.warm_up()

    @torch.inference_mode()
    def run(self, chunks: Rows[Chunk], rows: Rows[Row]) -> StepResult:
        """Compute all chunks, and draw for those that are last; ``rows`` are parallel to chunks.

        Rows that have a scorer find their prompt's scores in it.
        """
        self._choose_device()
        with self._staging.step():
            return self._run(chunks, rows)

    def _run(self, chunks: Rows[Chunk], rows: Rows[Row]) -> StepResult:
        hidden = self._forward(HostStep.of(chunks, self._block_size))
        ends = np.cumsum([chunk.num_tokens for chunk in chunks])
        for chunk, row, end in zip(chunks, rows, ends, strict=True):
            if row.scorer is not None:
                chunk_hidden = hidden[end - chunk.num_tokens : end]
                row.scorer.take(chunk.start, chunk_hidden, self._model.logits)
        last = [i for i, chunk in enumerate(chunks) if chunk.is_last]
        if not last:
            return StepResult()
        logits = self._model.logits(hidden[self._staging.copy(ends[last] - 1)])
        sequences = [chunks[i].sequence for i in last]
        batch = SamplingBatch(
            [rows[i] for i in last],
            [sequence.num_output_tokens for sequence in sequences],
            [(sequence.token_ids, sequence.num_prompt_tokens) for sequence in sequences],
            self._staging.copy,
        )
        return _result(sample(logits, batch), batch)

    def _forward(self, step: HostStep) -> torch.Tensor:
        """Hidden states [at least tokens, hidden], chunk after chunk."""
        if self._graphs is not None:
            hidden = self._graphs.forward(step)
            if hidden is not None:
                return hidden
        self._backend.plan(step.layout(self._staging.copy(step.slots)))
        return self._model.forward(
            self._staging.copy(step.token_ids), self._staging.copy(step.positions), self._backend
        )

    def _choose_device(self) -> None:
        """Launches and events go to the thread's own device, and the engine changes threads."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device.index or 0)


def _result(sampled: Sampled, batch: SamplingBatch) -> StepResult:
    tops: list[Top] = []
    if sampled.top_ids is not None and sampled.top_logprobs is not None:
        tops = [_NO_TOP] * len(sampled.token_ids)
        likeliest = zip(sampled.top_ids.tolist(), sampled.top_logprobs.tolist(), strict=True)
        for (i, count), (token_ids, logprobs) in zip(batch.tops, likeliest, strict=True):
            tops[i] = Top(token_ids[:count], logprobs[:count])
    return StepResult(sampled.token_ids.tolist(), sampled.logprobs.tolist(), tops, batch.problems)
