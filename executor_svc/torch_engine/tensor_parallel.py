"""One model on several devices: what rank 0 and the other ranks say to each other.

Rank 0 is the executor's own process: it has the leases, the batches, the sampler. The others are
its children (rank.py) and only compute. Rank 0 tells them what comes next through a pipe to each,
as plain whole numbers: a model to load, a step to run, rows whose logits are wanted. Inside a step
they work on each other's tensors by NCCL, or by gloo on CPUs (loopback only).

Rule: all ranks make the same calls in the same order, so a rank that fails inside a step leaves
the others waiting for it. Nothing is mended then: ``RankDiedError`` ends the engine, and the
process with it; the children end when their pipe or their parent does.
"""

import atexit
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from executor_svc.core.engine import ModelLoadError
from executor_svc.torch_engine.attention.base import AttentionBackend, StepLayout
from executor_svc.torch_engine.config import EngineConfig, find_device
from executor_svc.torch_engine.kv_cache import kv_slots
from executor_svc.torch_engine.models.decoder import Model

_DEATH_GRACE_S = 0.1  # a process's end may be a moment behind that of its connection

RunRank = Callable[[EngineConfig, int, Connection, str], None]


class RankDiedError(Exception):
    """A rank is gone or out of step; the engine cannot go on."""


class Operation(IntEnum):
    """The first number of a message of rank 0; the rest is as ``Ranks`` and ``Plan`` write it."""

    LOAD = 1
    FORWARD = 2
    LOGITS = 3


class Group:
    """One rank's side of the collectives (``models.collectives.Collectives``)."""

    def __init__(self, config: EngineConfig, rank: int, device: torch.device, store: str) -> None:
        self.rank, self.size = rank, config.tensor_parallel_size
        self._is_exact = config.exact_mode
        self._group = _connect(config, rank, device, store)

    def reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self.size == 2 or not self._is_exact:
            self._group.allreduce([x]).wait()
            return x
        # The library adds in an order that depends on where a row lies, and on how many there are.
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x]).wait()
        return sum(parts[1:], parts[0])

    def gather(self, x: Tensor) -> Tensor:  # [rows, columns] -> [rows, size * columns]
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._group.gather([parts] if parts else [], [x.contiguous()], options).wait()
        return torch.cat(parts, dim=1) if parts else x

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's ``x`` becomes everyone's."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([x], options).wait()


def _connect(config: EngineConfig, rank: int, device: torch.device, store: str) -> Any:
    """A group of its own and not torch's global one, which would be one for the whole process."""
    c10d: Any = dist  # its classes are exported without types
    kind = c10d.ProcessGroupNCCL if device.type == "cuda" else c10d.ProcessGroupGloo
    if device.type == "cuda":
        options = kind.Options()
    else:
        options = kind._Options()
        # By default gloo listens on the address of the machine's name.
        options._devices = [kind.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(milliseconds=config.tensor_parallel_timeout_ms)
    size = config.tensor_parallel_size
    return kind(c10d.FileStore(store, size), rank, size, options)


def rank_device(first: torch.device, rank: int) -> torch.device:
    """GPUs in a row from rank 0's on, ValueError if one is not there; ranks on the CPU share it."""
    if first.type == "cpu":
        return first
    return find_device(f"{first.type}:{(first.index or 0) + rank}")


@dataclass(frozen=True, slots=True)
class Plan:
    """A step in whole numbers, from which every rank makes the same tensors."""

    query_lens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    token_ids: list[int]

    def to_numbers(self) -> list[int]:
        """The chunks' counts, then everything else in order."""
        numbers = [len(self.query_lens), *self.query_lens, *self.context_lens]
        numbers += [len(table) for table in self.block_tables]
        for table in self.block_tables:
            numbers += table
        return numbers + self.token_ids

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> "Plan":
        count, rest = numbers[0], list(numbers[1:])
        query_lens, context_lens, table_lens = (rest[i * count : (i + 1) * count] for i in range(3))
        tables, start = [], 3 * count
        for length in table_lens:
            tables.append(rest[start : start + length])
            start += length
        return cls(query_lens, context_lens, tables, rest[start:])

    def positions(self) -> np.ndarray:  # [tokens]
        return np.concatenate([np.arange(start, end) for start, end in self._ranges()])

    def slots(self, block_size: int) -> np.ndarray:  # [tokens]
        return np.concatenate(
            [
                kv_slots(table, start, end, block_size)
                for table, (start, end) in zip(self.block_tables, self._ranges(), strict=True)
            ]
        )

    def _ranges(self) -> list[tuple[int, int]]:
        pairs = zip(self.query_lens, self.context_lens, strict=True)
        return [(context - query, context) for query, context in pairs]


class Ranks:
    """Rank 0's children. Raises RankDiedError from any call once one of them is gone."""

    def __init__(self, config: EngineConfig, device: torch.device, run_rank: RunRank) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch is not to be trusted
        self._models = [name for name, _ in config.models]
        self._children = []
        self._folder = tempfile.TemporaryDirectory(prefix="headway-ranks-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(1, config.tensor_parallel_size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=run_rank, args=(config, rank, theirs, store), name=f"rank-{rank}"
            )
            process.start()
            theirs.close()
            self._children.append((process, mine))
        atexit.register(self.close)  # else the interpreter would wait for them
        try:
            self.group = Group(config, 0, device, store)
        except Exception as fault:
            self.close()
            raise RankDiedError(f"the ranks did not find each other: {fault!r}") from fault

    def least_kv_bytes(self) -> int:
        """What the child with the least memory has for a model's cache, each model's alike."""
        return min(int.from_bytes(answer) for answer in self._answers())

    def load(self, model: str, num_blocks: int, resident: set[str]) -> None:
        """Children begin to load a model; they drop those that are not in ``resident``."""
        keep = sorted(map(self._models.index, resident))
        self._tell(Operation.LOAD, self._models.index(model), num_blocks, *keep)

    def wait_loaded(self) -> None:
        """Raises ModelLoadError if a child could not load what it was told to."""
        for rank, answer in enumerate(self._answers(), 1):
            if answer:
                raise ModelLoadError(f"rank {rank}: {answer.decode()}")

    def forward(self, model: str, plan: Plan) -> None:
        """Children begin this step."""
        self._tell(Operation.FORWARD, self._models.index(model), *plan.to_numbers())

    def logits(self, model: str, num_rows: int) -> None:
        """Children expect so many rows by broadcast, to make logits of."""
        self._tell(Operation.LOGITS, self._models.index(model), num_rows)

    def close(self) -> None:
        """End the children, which hold nothing that could be lost."""
        atexit.unregister(self.close)
        for process, connection in self._children:
            connection.close()
            process.kill()
            process.join()
        self._children = []
        self._folder.cleanup()

    def death(self, fault: BaseException) -> RankDiedError:
        """What to raise for a fault inside a step; says who is gone, if it was that."""
        for rank, (process, _) in enumerate(self._children, 1):
            process.join(_DEATH_GRACE_S)
            if process.exitcode is not None:
                return RankDiedError(f"rank {rank} has ended with status {process.exitcode}")
        return RankDiedError(f"the ranks are out of step: {fault!r}")

    def _tell(self, *numbers: int) -> None:
        message = np.array(numbers, dtype=np.int64).tobytes()
        try:
            for _, connection in self._children:
                connection.send_bytes(message)
        except OSError as fault:
            raise self.death(fault) from fault

    def _answers(self) -> list[bytes]:
        try:
            return [connection.recv_bytes() for _, connection in self._children]
        except (OSError, EOFError) as fault:
            raise self.death(fault) from fault


class LeadingDecoder:
    """Rank 0's part of a model, which takes the other ranks along."""

    def __init__(self, decoder: Model, ranks: Ranks, name: str) -> None:
        self._decoder, self._ranks, self._name = decoder, ranks, name

    def attach(self, backend: AttentionBackend) -> AttentionBackend:
        return AnnouncedBackend(backend, self._ranks.group.size)

    def forward(self, token_ids: Tensor, positions: Tensor, backend: AttentionBackend) -> Tensor:
        assert isinstance(backend, AnnouncedBackend)
        layout = backend.layout
        plan = Plan(
            list(layout.query_lens),
            list(layout.context_lens),
            list(layout.block_tables),
            token_ids.tolist(),
        )
        self._ranks.forward(self._name, plan)
        try:
            return self._decoder.forward(token_ids, positions, backend.inner)
        except Exception as fault:
            raise self._ranks.death(fault) from fault

    def logits(self, hidden: Tensor) -> Tensor:
        self._ranks.logits(self._name, hidden.shape[0])
        try:
            self._ranks.group.broadcast(hidden)
            return self._decoder.logits(hidden)
        except Exception as fault:
            raise self._ranks.death(fault) from fault


class AnnouncedBackend:
    """Rank 0's attention; it keeps the layout that it was planned for, to be told to others."""

    supports_graphs = can_replay = False  # a graph would leave the others behind
    paged = None

    def __init__(self, inner: AttentionBackend, num_ranks: int) -> None:
        self.inner = inner
        self.name = inner.name
        self.numerics = f"{inner.numerics} ranks={num_ranks}"

    def plan(self, layout: StepLayout) -> None:
        self.layout = layout
        self.inner.plan(layout)

    def run(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.inner.run(layer_index, q, k, v)
