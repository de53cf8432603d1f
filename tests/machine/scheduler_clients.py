"""What clients do to the scheduler's core, and what they must be answered."""

from math import ceil

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from headway.reasons import Reason
from scheduler_svc.core import failing
from scheduler_svc.core.messages import (
    Cancel,
    CloseDoor,
    Request,
    RequestAdmitted,
    RequestDeduplicated,
    RequestRejected,
    Submit,
)
from tests.machine.scheduler_model import MODELS, SETTINGS, TENANTS, ModelRequest, SchedulerModel


class ClientRules(SchedulerModel):
    """Requests, repeated ones, cancellations, and the end of service."""

    @rule(
        tenant=st.sampled_from(TENANTS),
        model=st.sampled_from((*MODELS, *MODELS, "unheard of")),
        band=st.sampled_from((2, 1, 0, 1, 2, 3)),
        num_samples=st.sampled_from((1, 1, 2, 5)),
        num_bytes=st.integers(1, 300),
        queue_timeout_ms=st.sampled_from((5_000, 2_000, 200, 0)),
        execution_timeout_ms=st.sampled_from((4_000, 400)),
        session_id=st.sampled_from(("", "s0", "s1")),
        num_blocks=st.integers(0, 3),
        key=st.sampled_from(("", "", "", "k0", "k1")),
        body_hash=st.sampled_from((b"0", b"0", b"1")),
    )
    def submit(
        self,
        tenant: str,
        model: str,
        band: int,
        num_samples: int,
        num_bytes: int,
        queue_timeout_ms: int,
        execution_timeout_ms: int,
        session_id: str,
        num_blocks: int,
        key: str,
        body_hash: bytes,
    ) -> None:
        self.num_requests += 1
        request = Request(
            request_id=f"r{self.num_requests}",
            tenant=tenant,
            model=model,
            band=band,
            num_prompt_tokens=20,
            max_tokens=10,
            num_samples=num_samples,
            num_bytes=num_bytes,
            queue_timeout_ms=queue_timeout_ms,
            execution_timeout_ms=execution_timeout_ms,
            session_id=session_id,
            prefix_hashes=tuple(range(num_blocks)),
            idempotency_key=key,
            body_hash=body_hash,
        )
        earlier = self.find_key(request)
        allowed = self.is_allowed(request)
        answers = [
            action
            for action in self.handle(Submit(request))
            if isinstance(action, RequestAdmitted | RequestDeduplicated | RequestRejected)
        ]
        assert len(answers) == 1
        match answers[0]:
            case RequestDeduplicated(original_id=original_id):
                assert earlier is not None
                assert original_id == earlier.request.request_id
                assert earlier.request.body_hash == body_hash
            case RequestRejected(reason=Reason.REQUEST_ID_CONFLICT):
                assert earlier is not None
                assert earlier.request.body_hash != body_hash
            case RequestRejected(reason=Reason.DEADLINE_UNREACHABLE):
                assert earlier is None
                assert self.waiting()
            case RequestRejected():
                assert earlier is None
                assert not allowed
            case RequestAdmitted():
                assert earlier is None
                assert allowed
                if key:
                    self.keys[tenant, key] = request.request_id

    @rule(
        tenant=st.sampled_from(TENANTS),
        bands=st.lists(st.integers(0, 2), min_size=2, max_size=7),
        model=st.sampled_from(MODELS),
        num_samples=st.sampled_from((1, 1, 2, 3)),
    )
    def submit_burst(self, tenant: str, bands: list[int], model: str, num_samples: int) -> None:
        """Plain requests, so that there is a queue."""
        for band in bands:
            self.submit(tenant, model, band, num_samples, 50, 3_000, 3_000, "", 0, "", b"")

    def find_key(self, request: Request) -> ModelRequest | None:
        original_id = self.keys.get((request.tenant, request.idempotency_key))
        if original_id is None:
            return None
        known = self.requests[original_id]
        if known.end is None:
            return known
        is_final = known.end.retry_after_ms is None
        is_kept = is_final and self.now_ms < known.end_ms + SETTINGS.result_ttl_ms
        return known if is_kept else None

    def is_allowed(self, request: Request) -> bool:
        live = [known.request for known in self.requests.values() if known.end is None]
        waiting = self.waiting()
        shares = SETTINGS.band_queue_shares
        share = shares[min(request.band, len(shares) - 1)]
        rows = self.core.snapshot(self.now_ms, 0).executors
        return (
            request.band < SETTINGS.num_bands
            and not self.is_closing
            and not failing.is_refused(self.core._state, request.model)
            and any(
                request.model in self.executors[r.executor_id].offers and r.state != "draining"
                for r in rows
                if not self.executors[r.executor_id].is_draining
            )
            and len(live) < SETTINGS.max_inflight
            and sum(r.tenant == request.tenant for r in live) < SETTINGS.max_inflight_per_tenant
            and sum(r.model == request.model for r in live) < SETTINGS.max_inflight_per_model
            and len(waiting) + 1 <= ceil(share * SETTINGS.max_queued_requests)
            and sum(r.num_tokens for r in [*waiting, request])
            <= ceil(share * SETTINGS.max_queued_tokens)
            and sum(r.num_bytes for r in [*waiting, request])
            <= ceil(share * SETTINGS.max_queued_bytes)
        )

    @rule(data=st.data(), is_foreign=st.sampled_from((False, False, False, True)))
    def cancel(self, data: st.DataObject, is_foreign: bool) -> None:
        request_id = self.any_request(data)
        known = self.requests.get(request_id)
        is_owner = known is not None and not is_foreign
        tenant = known.request.tenant if known is not None and is_owner else "stranger"
        was_live = known is not None and known.end is None
        self.handle(Cancel(request_id, tenant))
        if known is not None and was_live:
            assert (known.end is not None) is is_owner

    @precondition(lambda self: len(self.log) > 150)
    @rule()
    def close_door(self) -> None:
        self.is_closing = True
        self.handle(CloseDoor())
