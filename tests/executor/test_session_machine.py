"""Whatever orders, steps, breaks and adoptions come in whatever order: no token lost or doubled.

Models come and go meanwhile; no lease runs on one that is not there.

The model plays engine and scheduler. The scheduler keeps what it received of each request and,
when it takes a lease over, asks for any part again, as one that lost its memory would.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from executor_svc.core.engine import PromptScoring, SamplingParams, SequenceEnd
from executor_svc.core.messages import (
    Adopt,
    Disconnected,
    DrainExpired,
    GeneratedSample,
    Grant,
    LeaseEnded,
    LeaseRef,
    LoadOrder,
    ModelChange,
    ModelState,
    OrdersReceived,
    Outcome,
    Tick,
    Welcomed,
)
from tests.executor.session_engine import (
    MAX_TOKENS,
    MODELS,
    SessionEngine,
    is_scored,
    num_top,
    token,
)

GRACE_MS = 100


@dataclass
class Held:
    """The scheduler's side of one lease."""

    ref: LeaseRef
    handle: int
    samples: list[list[int]]
    ends: dict[int, SequenceEnd] = field(default_factory=dict)
    ended: LeaseEnded | None = None
    is_revoked: bool = False
    has_scores: bool = False
    are_scores_elsewhere: bool = False


class SessionMachine(SessionEngine):
    """The session between that engine and a scheduler, over a network that breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.is_attached = False
        self.attempts = 0
        self.next_handle = 1
        self.next_request = 0
        self.believed = {"m"}  # the scheduler's idea of what is resident
        self.held: dict[str, Held] = {}  # the scheduler, by request id
        self.routes: dict[int, tuple[Held, int]] = {}  # by handle, of this stream

    # --- helpers ---

    def new_ref(self, request_id: str) -> LeaseRef:
        self.attempts += 1
        return LeaseRef(request_id, 1, self.attempts)

    def route(self, lease: Held) -> None:
        for number in range(len(lease.samples)):
            self.routes[lease.handle + number] = (lease, number)

    def new_handle(self, num_samples: int, gap: int) -> int:
        handle = self.next_handle + gap
        self.next_handle = handle + num_samples
        return handle

    # --- the scheduler ---

    @precondition(lambda self: self.is_attached)
    @rule(data=st.data())
    def order_a_load(self, data: st.DataObject) -> None:
        """Sensible or not; the session is to see to it."""
        names = st.sampled_from([model.name for model in MODELS])
        evict = data.draw(st.lists(names, max_size=2, unique=True))
        self.tell(OrdersReceived(loads=(LoadOrder(data.draw(names), tuple(evict)),)))

    @precondition(lambda self: self.is_attached)
    @rule(num_samples=st.integers(1, 3), gap=st.integers(0, 2), data=st.data())
    def grant(self, num_samples: int, gap: int, data: st.DataObject) -> None:
        request_id = str(self.next_request)
        self.next_request += 1
        starts = [data.draw(st.integers(0, MAX_TOKENS - 1)) for _ in range(num_samples)]
        samples = [[token(request_id, n, i) for i in range(s)] for n, s in enumerate(starts)]
        self._grant(request_id, samples, {}, gap, has_scores=any(samples))

    @precondition(lambda self: self.is_attached and self.held)
    @rule(data=st.data())
    def grant_again(self, data: st.DataObject) -> None:
        """The scheduler gave the old lease up; the request comes back with what is known."""
        old = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        for number in range(len(old.samples)):
            self.routes.pop(old.handle + number, None)
        self._grant(old.ref.request_id, old.samples, old.ends, 0, has_scores=old.has_scores)

    def _grant(
        self,
        name: str,
        samples: list[list[int]],
        ends: dict[int, SequenceEnd],
        gap: int,
        *,
        has_scores: bool,
    ) -> None:
        lease = Held(self.new_ref(name), self.new_handle(len(samples), gap), samples, ends)
        lease.has_scores = lease.are_scores_elsewhere = has_scores
        self.held[name] = lease
        self.route(lease)
        grant = Grant(
            ref=lease.ref,
            handle=lease.handle,
            model=min(self.usable, default="m"),
            prompt_token_ids=[int(name)],
            params=SamplingParams(max_tokens=MAX_TOKENS, top_logprobs=num_top(name)),
            num_samples=len(samples),
            generated=tuple(
                self._generated(name, tokens, ends.get(number))
                for number, tokens in enumerate(samples)
            ),
            scoring=PromptScoring(wants_logprobs=True) if is_scored(name) else None,
            has_prompt_scores=has_scores,
        )
        if grant.model in self.usable:
            self.tell(OrdersReceived(grants=(grant,)))
            return
        del self.held[name]
        for number in range(len(samples)):
            del self.routes[lease.handle + number]
        self.tell(OrdersReceived(grants=(grant,)))

    def _generated(self, name: str, tokens: list[int], end: SequenceEnd | None) -> GeneratedSample:
        tops = [token_id + place for token_id in tokens for place in range(num_top(name))]
        return GeneratedSample(list(tokens), (), end, tops, [0.0] * len(tops))

    @precondition(lambda self: self.is_attached and self.held)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        lease = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        lease.is_revoked = True
        self.tell(OrdersReceived(revokes=(lease.ref,)))

    @precondition(lambda self: self.is_attached)
    @rule(attempt=st.integers(0, 3))
    def revoke_a_stranger(self, attempt: int) -> None:
        self.tell(OrdersReceived(revokes=(LeaseRef("stranger", 0, attempt),)))

    @precondition(lambda self: self.is_attached)
    @rule()
    def read(self) -> None:
        report = self.session.take_report()
        if report is None:
            return
        frame = report.frame
        assert len(frame.handle) <= 3
        for scores in frame.prompt_scores:
            if scores.key in self.routes:
                lease, number = self.routes[scores.key]
                assert number == 0
                assert not lease.has_scores, "they are sent once"
                lease.has_scores = True
        num_tops, stop = frame.num_top or [0] * len(frame.handle), 0
        assert sum(num_tops) == len(frame.top_token_id) == len(frame.top_logprob)
        for handle, index, token_id, count in zip(
            frame.handle, frame.index, frame.token_id, num_tops, strict=True
        ):
            start, stop = stop, stop + count
            assert frame.top_token_id[start:stop] == list(range(token_id, token_id + count))
            if handle in self.routes:
                lease, number = self.routes[handle]
                assert count == num_top(lease.ref.request_id)
                assert lease.has_scores or not is_scored(lease.ref.request_id)
                tokens = lease.samples[number]
                assert index <= len(tokens), "a gap"
                assert token_id == token(lease.ref.request_id, number, index)
                if index == len(tokens):
                    tokens.append(token_id)
        for end in frame.ends:
            if end.key in self.routes:
                lease, number = self.routes[end.key]
                assert len(lease.samples[number]) == end.num_tokens
                lease.ends[number] = end
        for ended in report.ended:
            self._read_end(ended)
        for change in report.models:
            self._read_change(change)

    def _read_change(self, change: ModelChange) -> None:
        if change.state is ModelState.RESIDENT:
            self.believed.add(change.model)
        else:
            self.believed.discard(change.model)

    def _read_end(self, ended: LeaseEnded) -> None:
        lease = self.held.get(ended.ref.request_id)
        if ended.outcome is Outcome.UNKNOWN:
            assert lease is None or lease.ref != ended.ref
        if lease is None or lease.ref != ended.ref:
            return
        assert lease.ended is None, "a lease ends once on a stream"
        lease.ended = ended
        if ended.outcome is not Outcome.REVOKED:
            assert ended.num_tokens == tuple(map(len, lease.samples)), "an end before its tokens"
        if ended.outcome is Outcome.COMPLETED:
            assert all(len(tokens) == MAX_TOKENS for tokens in lease.samples)
            assert len(lease.ends) == len(lease.samples)
            assert lease.has_scores or not is_scored(lease.ref.request_id)
        elif ended.outcome is Outcome.REVOKED:
            assert lease.is_revoked
        else:
            assert ended.outcome is Outcome.RETURNED

    @precondition(lambda self: self.is_attached and any(h.ended for h in self.held.values()))
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        ended = sorted(name for name, lease in self.held.items() if lease.ended)
        lease = self.held.pop(data.draw(st.sampled_from(ended)))
        self.tell(OrdersReceived(acknowledged=(lease.ref,)))

    @rule(dice=st.integers(1, 6))
    def expire_drain(self, dice: int) -> None:
        if dice == 6:
            self.tell(DrainExpired())

    # --- the network ---

    @precondition(lambda self: self.is_attached)
    @rule()
    def disconnect(self) -> None:
        self.is_attached = False
        self.tell(Disconnected())

    @rule(ms=st.integers(1, 70))
    def wait(self, ms: int) -> None:
        self.now_ms += ms
        self.tell(Tick())

    @precondition(lambda self: not self.is_attached)
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        self.is_attached = True
        self.next_handle = 1
        self.routes.clear()
        adopts = []
        listed = {lease.ref: lease for lease in self.session.hello()}
        self.believed = {model.name for model in self.session.offers() if model.is_resident}
        for name, lease in list(self.held.items()):
            here = listed.get(lease.ref)
            if here is None or data.draw(st.integers(0, 3)) == 3:
                del self.held[name]  # goes elsewhere
                continue
            held, lease.ref = lease.ref, self.new_ref(name)
            lease.handle = self.new_handle(len(lease.samples), 0)
            lease.ended = None
            next_index = []
            for number, num_tokens in enumerate(here.num_tokens):
                assert num_tokens >= len(lease.samples[number])
                kept = data.draw(st.integers(0, len(lease.samples[number])))
                del lease.samples[number][kept:]
                next_index.append(kept)
            lease.ends.clear()
            self.route(lease)
            if not any(next_index) and not lease.are_scores_elsewhere:  # lost with all tokens
                lease.has_scores = lease.has_scores and data.draw(st.booleans())
            adopt = Adopt(held, lease.ref, lease.handle, tuple(next_index), lease.has_scores)
            adopts.append(adopt)
        self.tell(Welcomed(GRACE_MS, tuple(data.draw(st.permutations(adopts)))))

    # --- always ---

    @invariant()
    def nothing_leaks(self) -> None:
        handles = self.session.heartbeat().handles
        if self.is_attached:
            assert sorted(handles) == sorted(lease.handle for lease in self.held.values())
        if not handles:
            assert not self.running, "the engine works for nobody"

    def teardown(self) -> None:
        """With a fair network and engine, all that is left ends, and is forgotten."""
        if not self.is_attached:
            return
        while self.running:
            self.run_to_the_end()
        while self.loading:
            self.load_ends(True)
        for _ in range(1000):
            self.read()
        for lease in self.held.values():
            assert lease.ended is not None, "a lease without an end"
        assert self.believed == self.resident
        self.tell(OrdersReceived(acknowledged=tuple(h.ref for h in self.held.values())))
        assert self.session.is_idle


SessionMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestSessionMachine = SessionMachine.TestCase
