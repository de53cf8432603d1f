"""Decode steps as CUDA graphs: two launches instead of some hundred.

Rule: there is a graph for some numbers of rows; a decode step is filled up with dummy rows to the
next one. A graph reads and writes the same addresses each time it is replayed, so a step is put
into buffers that stay: token ids and positions here, what rows want of their tokens in
``static_sampler.py``, everything else by ``backend.plan``. Dummies store nothing and have no keys;
a row does not depend on its company, so theirs changes nothing.

The first graph of a size goes from token ids to logits, the second from there to the tokens drawn.
They are two because rows with penalties, a grammar and the like are drawn outside of graphs, from
the logits that the first one leaves.

Prompt chunks, and steps too large for the largest graph, go the usual way. All graphs share a pool
of memory: no two run at the same time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from executor_svc.torch_engine.attention.base import AttentionBackend
from executor_svc.torch_engine.host_step import HostStep
from executor_svc.torch_engine.models.decoder import Model
from executor_svc.torch_engine.sampler import Row, Sampled
from executor_svc.torch_engine.staging import Staging
from executor_svc.torch_engine.static_sampler import StaticSampler

_MAX_BUCKET = 256
_BUCKET_STEP = 16

Computed = TypeVar("Computed", bound=tuple[Tensor | None, ...])


class Capture(Protocol):
    """Runs a computation once; gives its result, and what runs it again on the same addresses."""

    def __call__(self, compute: Callable[[], Computed]) -> tuple[Computed, Callable[[], None]]: ...


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows that have a graph: 1, 2, 4, 8, then each 16, and the most that is needed."""
    largest = min(max_num_seqs, _MAX_BUCKET)
    sizes = (1, 2, 4, 8, *range(_BUCKET_STEP, _MAX_BUCKET, _BUCKET_STEP))
    return (*(size for size in sizes if size < largest), largest)


@dataclass(frozen=True, slots=True)
class _Graph:
    """What replays write stays valid until the next one."""

    num_rows: int
    hidden: Tensor  # [rows, hidden]
    logits: Tensor  # [rows, vocab]
    compute: Callable[[], None]
    sampled: Sampled  # [rows]
    draw: Callable[[], None]


class Replayed:
    """A step that a graph has computed, or is about to."""

    def __init__(self, graph: _Graph, sampler: StaticSampler) -> None:
        self.hidden, self.logits = graph.hidden, graph.logits
        self._graph, self._sampler = graph, sampler

    def sample(self, rows: Sequence[Row], indices: Sequence[int]) -> Sampled:
        """Draw a token for each row, dummies included; all rows are plain."""
        self._sampler.fill(rows, indices, self._graph.num_rows)
        self._graph.draw()
        return self._graph.sampled


class DecodeGraphs:
    """The graphs of one model with its attention backend."""

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        staging: Staging,
        *,
        max_num_seqs: int,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        assert backend.supports_graphs
        self._model, self._backend, self._staging = model, backend, staging
        self._sizes = bucket_sizes(max_num_seqs)
        self._token_ids = torch.zeros(self._sizes[-1], dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._token_ids)
        self._sampler = StaticSampler(self._sizes[-1], staging, device)
        self._capture = capture or cuda_capture()
        self._graphs: dict[int, _Graph] = {}  # by number of rows
        # Those of the largest graph, shared by all: 78 MB for 256 rows of 150,000 tokens.
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture all graphs, the largest first, so that the others find room in its memory."""
        for size in reversed(self._sizes):
            with self._staging.step():
                self._fill(HostStep.of_dummies(size))
                self._sampler.fill((), (), size)
            self._graphs[size] = self._captured(size)

    def forward(self, step: HostStep, feed: Callable[[Tensor], None]) -> Replayed | None:
        """Compute a step; ``feed`` puts tokens that only the device knows in their places.

        None if no graph serves this step: then nothing was computed, and the backend has no plan.
        """
        num_rows = len(step.token_ids)
        if not step.is_decode or num_rows > self._sizes[-1]:
            return None
        size = next(size for size in self._sizes if size >= num_rows)
        self._fill(step.with_dummies(size))
        if not self._backend.can_replay:
            return None
        feed(self._token_ids)
        graph = self._graphs[size]
        graph.compute()
        return Replayed(graph, self._sampler)

    def _fill(self, step: HostStep) -> None:
        """Put a step into the buffers that graphs read."""
        self._backend.plan(step.layout(self._staging.copy(step.slots)))
        self._staging.copy(step.token_ids, out=self._token_ids)
        self._staging.copy(step.positions, out=self._positions)

    def _captured(self, size: int) -> _Graph:
        token_ids, positions = self._token_ids[:size], self._positions[:size]

        def compute() -> tuple[Tensor, Tensor]:
            hidden = self._model.forward(token_ids, positions, self._backend)
            logits = self._model.logits(hidden[:size])
            return hidden, logits if self._logits is None else self._logits[:size].copy_(logits)

        (hidden, logits), replay = self._capture(compute)
        if self._logits is None:
            self._logits = logits
        sampled, draw = self._capture(lambda: self._sampler.sample(logits))
        return _Graph(size, hidden, logits, replay, sampled, draw)


def cuda_capture() -> Capture:
    """Captures into CUDA graphs that share a pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], Computed]) -> tuple[Computed, Callable[[], None]]:
        # Kernels are compiled and libraries set up outside of the capture, on a stream of its own.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = compute()
        return out, graph.replay

    return capture
