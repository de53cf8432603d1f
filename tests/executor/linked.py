"""An executor's link with its engine and worker, and what a scheduler says to it."""

import asyncio
import functools
import threading
from typing import Any

from executor_svc.core.session import Session
from executor_svc.link import Link
from executor_svc.mock_engine import MockConfig, MockEngine
from executor_svc.settings import ExecutorSettings
from executor_svc.worker import Worker
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from tests.executor.scripted_scheduler import TIMEOUT_S

VOCAB = 1_000
LONG = 20_000  # tokens; far more than a test waits for


class GatedEngine(MockEngine):
    """Loads a model when the test lets it."""

    def __init__(self, config: MockConfig) -> None:
        super().__init__(config)
        self.gate = threading.Semaphore(0)

    def load(self, model: str, evict: tuple[str, ...]) -> int:
        assert self.gate.acquire(timeout=TIMEOUT_S)
        super().load(model, evict)
        return 1500


class Executor:
    """A link with its engine and worker, running in a task."""

    def __init__(self, address: str, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "executor_id": "e1",
            "scheduler_addresses": address,
            "backoff_initial_ms": 1,
            "backoff_max_ms": 20,
            "attach_timeout_ms": 5_000,
            "drain_timeout_ms": 5_000,
        }
        self.settings = ExecutorSettings(**(fields | changes))
        self.engine = GatedEngine(
            MockConfig(models=("mock", "other"), max_models=1, step_ms=1.0, vocab_size=VOCAB)
        )
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.worker = Worker(lambda: self.engine, max_backlog_tokens=1 << 20)
        self.session = Session(
            self.engine.models,
            num_slots=256,
            max_models=self.engine.max_models,
            max_leases=100,
            max_report_tokens=1000,
        )
        self.link = Link(
            self.settings,
            self.session,
            self.worker,
            engine_ready=ready,
            incarnation="i1",
            max_models=self.engine.max_models,
            assets={model.name: self.engine.assets(model.name) for model in self.engine.models},
        )
        self.worker.start(functools.partial(loop.call_soon_threadsafe, ready.set))
        self.task = asyncio.create_task(self.link.run())

    async def ended(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.task

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        assert self.worker.close(TIMEOUT_S)


def ref(request_id: str, attempt: int = 1) -> fleet.LeaseRef:
    return fleet.LeaseRef(request_id=request_id, epoch=1, attempt=attempt)


def grant(request_id: str, handle: int, max_tokens: int = 5, **sampling: Any) -> fleet.Grant:
    request = generation.GenerationRequest(
        model="mock",
        prompt_token_ids=[handle],
        sampling=generation.SamplingParams(max_tokens=max_tokens, seed=3, **sampling),
    )
    return fleet.Grant(lease=ref(request_id), handle=handle, request=request)
