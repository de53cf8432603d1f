"""The 78 scenarios of the reference scheduler: that each has a test, and the world they play in.

Words of the reference -> ours: backend = executor, sticky window = hold, model listed on a backend
= offered by an executor (and cold there until loaded), ``b(cap, max)`` = slots and max_models, 503
of the queue = QUEUE_TIMEOUT. A backend without max_models has room for all its models.
"dispatch" is one cycle of the reference; our core decides after every event, so what must be
decided together is submitted while the executors are closed (``World.closed``).
"""

import heapq
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scheduler_svc.core.answers import ReservationRow
from scheduler_svc.core.messages import (
    Action,
    Event,
    ExecutorAttached,
    ExecutorCapacityChanged,
    HeldLease,
    LeaseEnded,
    LeaseGranted,
    LeaseOutcome,
    ModelChanged,
    ModelLoadOrdered,
    ModelOffer,
    ModelState,
    Submit,
    Tick,
)
from tests.core.scheduler.helpers import EPOCH, Driver, of_type, request

SCENARIOS = range(1, 79)
UNLIMITED = 8  # more models than any scenario has


class World(Driver):
    """Executors that load what they are told to; hybrid mode unless bonus is 0."""

    def __init__(
        self,
        *,
        bonus: int = 10,
        equalization_ms: int = 30_000,
        hold_ms: int = 0,
        load_ms: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(
            warm_bonus=bonus,
            aging_equalization_ms=equalization_ms,
            model_hold_ms=hold_ms,
            **settings,
        )
        self.load_ms = load_ms
        # model -> how long its requests run; those of others run until ``done``
        self.run_ms: dict[str, int] = {}
        # name -> (slots, max_models), in order of attach
        self.backends: dict[str, tuple[int, int]] = {}
        # (when, number, event): loads and ends to come
        self._coming: list[tuple[int, int, Event]] = []
        self._num_coming = 0
        self._num_requests: dict[str, int] = {}

    # --- events -------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Action]:
        sent = super().handle(event)
        for load in of_type(sent, ModelLoadOrdered):
            assert isinstance(load, ModelLoadOrdered)
            name, session = load.executor_id, load.session
            for model in load.evict:
                sent += self.handle(ModelChanged(name, session, model, ModelState.ABSENT))
            resident = ModelChanged(name, session, load.model, ModelState.RESIDENT, self.load_ms)
            if self.load_ms:
                self._later(self.load_ms, resident)
            else:
                sent += self.handle(resident)
        for grant in of_type(sent, LeaseGranted):
            assert isinstance(grant, LeaseGranted)
            run_ms = self.run_ms.get(grant.request_id[0])
            if run_ms is not None and self.place(grant.request_id) is not None:
                ref = (grant.executor_id, grant.session, grant.request_id)
                self._later(run_ms, LeaseEnded(*ref, EPOCH, grant.attempt, LeaseOutcome.COMPLETED))
        return sent

    def _later(self, ms: int, event: Event) -> None:
        self._num_coming += 1
        heapq.heappush(self._coming, (self.now_ms + ms, self._num_coming, event))

    def advance(self, ms: int) -> list[Action]:
        """Let time pass: Ticks at the core's deadlines, loads and ends when they come."""
        end_ms = self.now_ms + ms
        sent: list[Action] = []
        while True:
            due_ms = self.core.next_deadline_ms()
            coming_ms = self._coming[0][0] if self._coming else None
            if coming_ms is not None and coming_ms <= end_ms and not (due_ms or end_ms) < coming_ms:
                self.now_ms = max(self.now_ms, coming_ms)
                sent += self.handle(heapq.heappop(self._coming)[2])
            elif due_ms is not None and due_ms < end_ms:
                self.now_ms = max(self.now_ms, due_ms)
                sent += self.handle(Tick())
            else:
                self.now_ms = end_ms
                return sent + self.handle(Tick())

    # --- executors ----------------------------------------------------------------------

    def backend(
        self,
        name: str,
        num_slots: int,
        models: str = "AB",
        max_models: int = UNLIMITED,
        *,
        resident: str = "",
        loading: str = "",
        incarnation: str = "i1",
        holds: tuple[HeldLease, ...] = (),
    ) -> list[Action]:
        """b(cap, max) attaches; its models are cold but for ``resident``."""
        self.backends[name] = (num_slots, max_models)
        session = self.sessions[name] = self.sessions.get(name, 0) + 1
        offers = tuple(
            ModelOffer(model, model in resident, self.load_ms, model == loading) for model in models
        )
        return self.handle(
            ExecutorAttached(name, session, incarnation, num_slots, max_models, offers, holds)
        )

    def change(self, name: str, num_slots: int, max_models: int | None = None) -> list[Action]:
        """Capacity changes."""
        _, before = self.backends[name]
        most = before if max_models is None else max_models
        return self.handle(ExecutorCapacityChanged(name, self.sessions[name], num_slots, most))

    @contextmanager
    def closed(self) -> Iterator[None]:
        """No executor has a free slot meanwhile; then all open again in order of attach."""
        for name in self.backends:
            self.change(name, self.row(name).num_leased)
        yield
        for name, (num_slots, _) in self.backends.items():
            self.change(name, num_slots)

    def reservation(self, name: str) -> str | None:
        """The model that an executor is reserved for."""
        row: ReservationRow | None = self.row(name).reservation
        return row.model if row is not None else None

    # --- requests -----------------------------------------------------------------------

    def ask(self, models: str, **changes: Any) -> list[str]:
        """Requests of these models arrive one after another: "AAB" -> A1, A2, B1."""
        names = []
        for model in models:
            number = self._num_requests[model] = self._num_requests.get(model, 0) + 1
            names.append(f"{model}{number}")
            self.handle(Submit(request(names[-1], model, **changes)))
        return names

    def run(self, models: str, backend: str) -> list[str]:
        """Requests that run on the backend from now on."""
        names = self.ask(models)
        assert [self.place(name) for name in names] == [backend] * len(names)
        return names

    def place(self, name: str) -> str | None:
        """Where a request runs; None if it waits or is gone."""
        lease = self.core.current_lease(name)
        return None if lease is None else lease[0]

    def places(self, *names: str) -> list[str | None]:
        """Where each of them runs."""
        return [self.place(name) for name in names]

    def done(self, *names: str) -> list[Action]:
        """Requests that run end well."""
        sent = []
        for name in names:
            backend = self.place(name)
            assert backend is not None
            sent += self.end(name, backend)
        return sent


def test_every_scenario_has_a_test_and_stands_in_the_document() -> None:
    here = Path(__file__).parent
    document = (here.parents[2] / "docs" / "scheduling.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| `(\w+)` \|", document, re.M)
    tests = [
        (str(int(number)), name, path.stem.removeprefix("test_scenarios_"))
        for path in here.glob("test_scenarios_*.py")
        for number, name in re.findall(
            r"^(?:async )?def test_scenario_(\d\d)_(\w+)", path.read_text(), re.M
        )
    ]
    assert set(rows) == set(tests)
    assert [int(number) for number, _, _ in rows] == list(SCENARIOS)
