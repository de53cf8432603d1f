"""The process of a rank other than 0: loads its part of each model, runs the steps it is told.

It ends when rank 0 closes its pipe, and at once when rank 0's process is gone, be it inside a
collective that would never come back.
"""

import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
import torch

from executor_svc.torch_engine.attention.base import AttentionBackend, StepLayout
from executor_svc.torch_engine.attention.choice import choose_backend, make_attention
from executor_svc.torch_engine.config import EngineConfig, find_device
from executor_svc.torch_engine.exactness import prepare
from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.loader import find_model
from executor_svc.torch_engine.model_config import load_spec
from executor_svc.torch_engine.models.decoder import Model
from executor_svc.torch_engine.models.sharding import Shard
from executor_svc.torch_engine.residency import Residency
from executor_svc.torch_engine.tensor_parallel import (
    Group,
    Operation,
    Plan,
    Ranks,
    rank_device,
)


def start_ranks(config: EngineConfig) -> Ranks | None:
    """The children of rank 0, if models are to be divided; ValueError if one cannot be."""
    if config.tensor_parallel_size == 1:
        return None
    for _, source in config.models:  # before anything is started
        spec = load_spec(find_model(source), max_model_len=config.max_model_len)
        Shard(size=config.tensor_parallel_size).spec(spec)
    return Ranks(config, find_device(config.device), run_rank)


def run_rank(config: EngineConfig, rank: int, connection: Connection, store: str) -> None:
    """The whole life of a child process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 drains first, and then closes the pipe
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        device = rank_device(find_device(config.device), rank)
        if config.exact_mode:
            prepare(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        member = Member(config, device, Group(config, rank, device, store))
    except (ModelError, ValueError) as error:
        sys.exit(f"rank {rank}: {error}")
    connection.send_bytes(member.residency.kv_bytes.to_bytes(8))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        answer = member.obey(np.frombuffer(message, dtype=np.int64).tolist())
        if answer is not None:
            connection.send_bytes(answer)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Member:
    """A rank's models and what it does with them."""

    def __init__(self, config: EngineConfig, device: torch.device, group: Group) -> None:
        self._device, self._group = device, group
        self.residency = Residency(config, device, collectives=group)
        dtypes = {model.spec.dtype for model in self.residency.models.values()}
        self._config = replace(config, attention_backend=choose_backend(config, device, dtypes))
        if self.residency.num_threads is not None:
            torch.set_num_threads(self.residency.num_threads)
        self._names = list(self.residency.models)
        self._resident: dict[str, tuple[Model, AttentionBackend]] = {}

    @torch.inference_mode()
    def obey(self, numbers: list[int]) -> bytes | None:
        """Do what a message says; gives the answer, if one is due."""
        operation, name, rest = numbers[0], self._names[numbers[1]], numbers[2:]
        match Operation(operation):
            case Operation.LOAD:
                return self._load(name, rest[0], {self._names[i] for i in rest[1:]})
            case Operation.FORWARD:
                self._forward(name, Plan.of_numbers(rest))
            case Operation.LOGITS:
                self._logits(name, rest[0])
        return None

    def _load(self, name: str, num_blocks: int, keep: set[str]) -> bytes:
        """Answers with what went wrong, or nothing."""
        for other in self._resident.keys() - keep:
            del self._resident[other]
            self.residency.leave(other)
        try:
            decoder = self.residency.bring(name, set(self._resident))
            spec = self.residency.models[name].spec
            attention = make_attention(
                spec, self._config, num_blocks=num_blocks, device=self._device
            )
        except Exception as fault:
            return (str(fault) or repr(fault)).encode()
        self._resident[name] = decoder, attention
        return b""

    def _forward(self, name: str, plan: Plan) -> None:
        decoder, attention = self._resident[name]
        slots = self._to_device(plan.slots(self._config.block_size))
        attention.plan(StepLayout(plan.query_lens, plan.context_lens, plan.block_tables, slots))
        token_ids = self._to_device(np.array(plan.token_ids))
        decoder.forward(token_ids, self._to_device(plan.positions()), attention)

    def _logits(self, name: str, num_rows: int) -> None:
        decoder, _ = self._resident[name]
        spec = self.residency.models[name].spec
        hidden = torch.empty(num_rows, spec.hidden_size, dtype=spec.dtype, device=self._device)
        self._group.broadcast(hidden)
        decoder.logits(hidden)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
