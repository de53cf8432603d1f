"""Runs steps: chunks in, a token for each chunk that completes its sequence out.

A step is launched, and its result read later: a GPU works on its own, so the host may plan and
launch the next step in the meantime. Rows of that one whose token the host has not seen yet take it
from where the step before left it on the device. On a CPU a launched step has been computed.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from executor_svc.core.batcher import Chunk
from executor_svc.core.sequence import Sequence
from executor_svc.torch_engine.attention.base import AttentionBackend
from executor_svc.torch_engine.graphs import DecodeGraphs, Replayed
from executor_svc.torch_engine.host_step import PENDING, HostStep
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


class Launched:
    """A step on its way, and the tokens that it draws, in order of its chunks that are last."""

    def __init__(
        self,
        sequences: Rows[Sequence] = (),
        sampled: Sampled | None = None,
        tops: Rows[tuple[int, int]] = (),
        problems: dict[int, str] | None = None,
    ) -> None:
        self.row_of = {sequence: row for row, sequence in enumerate(sequences)}
        self._sampled, self._tops, self._problems = sampled, tops, problems or {}
        self._event: torch.cuda.Event | None = None
        if sampled is not None:
            self._host = sampled.map(_to_host)
            if sampled.token_ids.is_cuda:
                self._event = torch.cuda.Event()
                self._event.record()

    @property
    def token_ids(self) -> Tensor:  # [rows], on the device
        assert self._sampled is not None
        return self._sampled.token_ids

    def result(self) -> StepResult:
        """What it drew; waits until the device has come that far."""
        if self._sampled is None:
            return StepResult()
        if self._event is not None:
            self._event.synchronize()
        sampled, tops = self._host, list[Top]()
        if sampled.top_ids is not None and sampled.top_logprobs is not None:
            tops = [_NO_TOP] * len(sampled.token_ids)
            likeliest = zip(sampled.top_ids.tolist(), sampled.top_logprobs.tolist(), strict=True)
            for (i, count), (token_ids, logprobs) in zip(self._tops, likeliest, strict=True):
                tops[i] = Top(token_ids[:count], logprobs[:count])
        return StepResult(
            sampled.token_ids.tolist(), sampled.logprobs.tolist(), tops, self._problems
        )


def _to_host(x: Tensor) -> Tensor:
    """A copy, from a GPU into pinned memory, which is there when the device has come so far."""
    return x.to("cpu", non_blocking=True, copy=True)


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
    def launch(
        self, chunks: Rows[Chunk], rows: Rows[Row], previous: Launched | None = None
    ) -> Launched:
        """Compute all chunks, and draw for those that are last; ``rows`` are parallel to chunks.

        ``previous`` is the step before, which has the tokens that are pending. Rows that have a
        scorer find their prompt's scores in it.
        """
        self._choose_device()
        with self._staging.step():
            return self._launch(chunks, rows, previous)

    def _launch(self, chunks: Rows[Chunk], rows: Rows[Row], previous: Launched | None) -> Launched:
        ends = np.cumsum([chunk.num_tokens for chunk in chunks])
        hidden, replayed = self._forward(chunks, ends, previous)
        for chunk, row, end in zip(chunks, rows, ends, strict=True):
            if row.scorer is not None:
                chunk_hidden = hidden[end - chunk.num_tokens : end]
                row.scorer.take(chunk.start, chunk_hidden, self._model.logits)
        last = [i for i, chunk in enumerate(chunks) if chunk.is_last]
        if not last:
            return Launched()
        sequences = [chunks[i].sequence for i in last]
        rows = [rows[i] for i in last]
        indices = [sequence.num_output_tokens for sequence in sequences]
        if replayed is not None and len(last) == len(chunks):
            if all(row.is_plain(index) for row, index in zip(rows, indices, strict=True)):
                sampled = replayed.sample(rows, indices)
                return Launched(sequences, Sampled(*(x[: len(rows)] for x in sampled[:2])))
            logits = replayed.logits[: len(rows)]
        else:
            logits = self._model.logits(hidden[self._staging.copy(ends[last] - 1)])
        batch = SamplingBatch(
            rows,
            indices,
            [(sequence.token_ids, sequence.num_prompt_tokens) for sequence in sequences],
            self._staging.copy,
            with_kernels=self._device.type == "cuda",
        )
        return Launched(sequences, sample(logits, batch), batch.tops, batch.problems)

    def _forward(
        self, chunks: Rows[Chunk], ends: np.ndarray, previous: Launched | None
    ) -> tuple[Tensor, Replayed | None]:
        """Hidden states [at least tokens, hidden], chunk after chunk; by a graph, if there is one.

        ``ends`` [chunks] is where the tokens of each chunk end.
        """
        step = HostStep.of(chunks, self._block_size)

        def feed(token_ids: Tensor) -> None:  # [at least tokens]
            self._feed(token_ids, chunks, ends, previous)

        if self._graphs is not None:
            replayed = self._graphs.forward(step, feed)
            if replayed is not None:
                return replayed.hidden, replayed
        self._backend.plan(step.layout(self._staging.copy(step.slots)))
        token_ids = self._staging.copy(step.token_ids)
        feed(token_ids)
        positions = self._staging.copy(step.positions)
        return self._model.forward(token_ids, positions, self._backend), None

    def _feed(
        self,
        token_ids: Tensor,
        chunks: Rows[Chunk],
        ends: np.ndarray,
        previous: Launched | None,
    ) -> None:
        """Put tokens of the step before in the places of those that are pending."""
        places, drawn = [], []
        for chunk, end in zip(chunks, ends, strict=True):
            if chunk.is_last and chunk.sequence.token_ids[-1] == PENDING:
                assert previous is not None
                places.append(end - 1)
                drawn.append(previous.row_of[chunk.sequence])
        if previous is not None and places:
            at = self._staging.copy(np.array([places, drawn]))
            token_ids.index_copy_(0, at[0], previous.token_ids[at[1]])

    def _choose_device(self) -> None:
        """Launches and events go to the thread's own device, and the engine changes threads."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device.index or 0)
