"""From a lease as it comes in to sequences that can run, and what the sampler knows of them."""

from dataclasses import dataclass

from executor_svc.core.engine import LeaseRequest, SequenceEnd
from executor_svc.core.lease_rules import check_lease
from executor_svc.core.sequence import Sequence
from executor_svc.core.stopping import StopMatcher, StopRules
from executor_svc.torch_engine.grammar import Compilation
from executor_svc.torch_engine.known_model import KnownModel
from executor_svc.torch_engine.sampler import Row
from executor_svc.torch_engine.scoring import PromptScorer


@dataclass(frozen=True, slots=True)
class Arrival:
    """A lease that was looked at: its samples that live, and the ends of those that do not."""

    request: LeaseRequest
    live: list[Sequence]
    ends: list[SequenceEnd]
    compilation: Compilation | None  # of its grammar

    @property
    def is_ready(self) -> bool:
        return self.compilation is None or self.compilation.is_done

    def wait(self, timeout_s: float) -> None:
        """Until it is ready, or so long."""
        if self.compilation is not None:
            self.compilation.wait(timeout_s)

    def cancel(self) -> None:
        """The lease is gone."""
        if self.compilation is not None:
            self.compilation.cancel()


class Waiting:
    """Arrivals whose grammars are being compiled."""

    def __init__(self) -> None:
        self._arrivals: dict[int, Arrival] = {}  # by lease key

    def __contains__(self, key: int) -> bool:
        return key in self._arrivals

    def __len__(self) -> int:
        return len(self._arrivals)

    def add(self, arrival: Arrival) -> None:
        self._arrivals[arrival.request.key] = arrival

    def drop(self, key: int) -> None:
        """Its lease is gone, if it was here at all."""
        if (arrival := self._arrivals.pop(key, None)) is not None:
            arrival.cancel()

    def clear(self) -> None:
        """All leases are gone."""
        for key in list(self._arrivals):
            self.drop(key)

    def take_ready(self, *, timeout_s: float) -> list[Arrival]:
        """Those that wait no longer, after at most so long; the first one to come is waited for."""
        next(iter(self._arrivals.values())).wait(timeout_s)
        ready = [key for key, arrival in self._arrivals.items() if arrival.is_ready]
        return [self._arrivals.pop(key) for key in ready]


class Arrivals:
    """Takes the leases of one model."""

    def __init__(self, known: KnownModel, *, max_logits_rows: int | None) -> None:
        self._info = known.info
        self._token_bytes, self._grammars = known.token_bytes, known.grammars
        self._max_logits_rows = max_logits_rows

    def take(self, request: LeaseRequest) -> Arrival:
        """Check a lease and begin to compile its grammar. Raises InvalidLeaseError."""
        check_lease(request, self._info, can_match_text=self._can_match_text)
        live, ends = [], []
        for sample in range(request.num_samples):
            if sample in request.ended:
                continue
            sequence, end = self._sequence(request, sample)
            if end is not None:
                ends.append(end)
            else:
                live.append(sequence)
        for sequence in live[1:]:
            sequence.leader = live[0]
        return Arrival(request, live, ends, self._compilation(request, live))

    def rows(self, arrival: Arrival) -> list[Row]:
        """Of the samples that live, once the arrival is ready. Raises InvalidLeaseError."""
        request, rows = arrival.request, []
        for sequence in arrival.live:
            matcher = None if arrival.compilation is None else arrival.compilation.matcher()
            stop_token_ids = sequence.stops.stop_token_ids
            rows.append(Row.of(request.params, sequence.sample, stop_token_ids, matcher=matcher))
        if rows and request.scoring is not None:
            rows[0].scorer = PromptScorer(
                request.scoring,
                request.prompt_token_ids,
                request.params,
                vocab_size=self._info.vocab_size,
                max_rows=self._max_logits_rows,
            )
            arrival.live[0].max_cached_tokens = rows[0].scorer.next_row
        return rows

    def piece(self, sequence: Sequence, token_id: int) -> bytes:
        """The token's bytes, where the sequence looks at them."""
        if sequence.stops.matcher is None or self._token_bytes is None:
            return b""
        return self._token_bytes[token_id]

    @property
    def _can_match_text(self) -> bool:
        return self._token_bytes is not None and self._token_bytes.is_supported

    def _sequence(self, request: LeaseRequest, sample: int) -> tuple[Sequence, SequenceEnd | None]:
        """Sample number ``sample`` of a lease, replayed up to where an earlier attempt came.

        The end is given if what is there already ends the sequence.
        """
        params = request.params
        stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids |= frozenset(self._info.eos_token_ids)
        matcher = StopMatcher(params.stop_strings) if params.stop_strings else None
        sequence = Sequence(
            key=request.key + sample,
            lease_key=request.key,
            sample=sample,
            params=params,
            stops=StopRules(params.max_tokens, params.min_tokens, stop_token_ids, matcher),
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            salt=request.cache_salt,
        )
        end = None
        for token_id in request.generated[sample] if request.generated else ():
            end = sequence.append(token_id, self.piece(sequence, token_id))
        return sequence, end

    def _compilation(self, request: LeaseRequest, live: list[Sequence]) -> Compilation | None:
        """Of the lease's grammar, if it has one. Raises InvalidLeaseError."""
        if request.params.grammar is None or not live:
            return None
        assert self._grammars is not None  # check_lease has seen to that
        return self._grammars.begin(
            request.params.grammar,
            salt=request.cache_salt,
            terminators=live[0].stops.stop_token_ids,
        )
