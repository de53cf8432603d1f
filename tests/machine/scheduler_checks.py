"""What must hold of the scheduler's core after every event."""

from collections import Counter

from hypothesis.stateful import invariant

from scheduler_svc.core.answers import ExecutorRow
from scheduler_svc.core.domain import RequestRecord
from tests.machine.scheduler_model import MODELS, SETTINGS, SchedulerModel


class SchedulerChecks(SchedulerModel):
    """Its own invariants, and those that only somebody outside of it can state."""

    @invariant()
    def agrees_with_itself(self) -> None:
        self.core.check_invariants()

    @invariant()
    def live_requests_are_in_one_place(self) -> None:
        num_live = 0
        for request_id, known in self.requests.items():
            status = self.core.status(request_id, self.now_ms)
            assert self.core.is_live(request_id) is (known.end is None) is (status is not None)
            num_live += known.end is None
            lease = self.core.current_lease(request_id)
            if lease is not None:
                name, session, attempt = lease
                assert status is not None
                assert status.is_running
                assert self.executors[name].session == session
                assert attempt == known.attempt
        assert self.core.num_waiting + self.core.num_running == num_live
        assert self.core.num_waiting == len(self.waiting())

    @invariant()
    def positions_are_true(self) -> None:
        for request in self.waiting():
            pool = self.pool(request.model)
            place = self.order_in_flow(request.band, request.model)
            index = [record.request for record in place].index(request)
            last = max(record.arrival for record in place[: index + 1])
            turn = (last - self.bonus(request.model), last)
            before = index
            for record in self.core._state.requests:
                other = record.request
                if record.lease is None and other.model in pool:
                    is_of_flow = (other.band, other.model) == (request.band, request.model)
                    before += other.band < request.band or (
                        other.band == request.band
                        and not is_of_flow
                        and (record.arrival - self.bonus(other.model), record.arrival) < turn
                    )
            status = self.core.status(request.request_id, self.now_ms)
            assert status is not None
            assert status.position == before
            assert status.depth == sum(other.model in pool for other in self.waiting())

    def pool(self, model: str) -> set[str]:
        """The models on its homes; without a home itself alone."""
        rows = self.core.snapshot(self.now_ms, 0).executors
        serving = [row for row in rows if row.state == "attached" and row.num_slots]
        homes = [
            row
            for row in serving
            if model in row.resident_models and not self.is_reserved(row, model)
        ]
        return {model}.union(*(row.resident_models for row in homes))

    def is_reserved(self, row: ExecutorRow, model: str) -> bool:
        """All of it for another model."""
        reservation = self.core._state.fleet.executors[row.executor_id].reservation
        return (
            reservation is not None
            and reservation.model != model
            and reservation.num_kept >= row.num_slots
        )

    def bonus(self, model: str) -> int:
        """What its warmth is worth, in arrivals."""
        rows = self.core.snapshot(self.now_ms, 0).executors
        serving = [row for row in rows if row.state == "attached" and row.num_slots]
        warm = any(
            model in row.resident_models and not self.is_reserved(row, model) for row in serving
        )
        loading = any(row.loading_model == model for row in serving)
        return SETTINGS.aging_equalization_ms * (1_024 if warm else 512 if loading else 0)

    def order_in_flow(self, band: int, model: str) -> list[RequestRecord]:
        """Those that came back, then by the virtual time that each would start at."""
        state = self.core._state
        records = [
            record
            for record in sorted(state.requests, key=lambda record: record.arrival)
            if record.lease is None and (record.request.band, record.request.model) == (band, model)
        ]
        starts: dict[int, float] = {}
        costs: Counter[str] = Counter()
        for record in records:
            tenant = record.request.tenant
            if not record.is_returned:
                weight = SETTINGS.tenant_weights.get(tenant, 1.0)
                key = state.queue.fairness.key((band, model), tenant)
                starts[record.arrival] = key + costs[tenant] / weight
                costs[tenant] += state.queue.cost(record.request)
        return sorted(
            records,
            key=lambda r: (not r.is_returned, starts.get(r.arrival, 0), r.arrival),
        )

    @invariant()
    def snapshot_is_in_grant_order(self) -> None:
        flows = {
            (band, model): self.order_in_flow(band, model)
            for band in range(SETTINGS.num_bands)
            for model in MODELS
        }
        last_turns = {
            (band, model): flow.last_turn
            for band, models in enumerate(self.core._state.queue.bands)
            for model, flow in models.items()
        }
        expected: list[str] = []
        while any(flows.values()):
            first = min(band for (band, _), flow in flows.items() if flow)
            heads = [
                self.turn(flow, last_turns[name], first) for name, flow in flows.items() if flow
            ]
            head = min(heads)[-1].request
            expected.append(head.request_id)
            flows[head.band, head.model].pop(0)
            last_turns[head.band, head.model] = self.now_ms * 1_024
        rows = self.core.snapshot(self.now_ms, 4).queue
        assert [row.request_id for row in rows] == expected[:4]

    def turn(
        self, flow: list[RequestRecord], last_turn: int, first_band: int
    ) -> tuple[int, int, int, int, RequestRecord]:
        """When the head of a flow, which had its last grant then, goes, against those of others."""
        head = flow[0]
        since = max(last_turn, min(record.arrival for record in flow))
        standing = min(head.arrival, since + SETTINGS.aging_equalization_ms * 1_024)
        limits_ms = SETTINGS.band_max_wait_ms
        limit_ms = limits_ms[min(head.request.band, len(limits_ms) - 1)]
        is_overdue = self.now_ms - standing // 1_024 >= limit_ms
        band = first_band if is_overdue else head.request.band
        return band, standing - self.bonus(head.request.model), standing, head.arrival, head
