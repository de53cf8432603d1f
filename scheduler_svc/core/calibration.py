"""How far predicted waits were off, by kind of prediction: the last correction of an ETA.

Rule: an estimate is ``raw x factor``, one factor for each (situation, distance, part of its own
tenant). Now and then the raw estimate of a new request is kept; when it is granted its factor moves
by a small part of the logarithm of what was still missing, cut to ``_MOST``, so it settles about
where as many waits turn out longer as shorter. That holds what no formula here knows: models that
come and go, and tenants that will overtake. These overtake most whoever stands behind the backlog
of its own tenant, since a tenant that asks for less than its fair part goes first (fairness.py).
"""

from dataclasses import dataclass
from math import exp, log
from typing import Final

# a new estimate is kept at most so often; waiting ones are at most so many
_EVERY_MS: Final = 200
_MAX_SAMPLES: Final = 1_000
# part of the error that one sample corrects: 1 / _FIRST of the first one, less of each later one
# until this much; the most that an error counts, and the factors' bounds
_GAIN, _FIRST = 0.005, 8
_MOST: Final = 0.5
_LEAST_FACTOR, _LARGEST_FACTOR = 0.1, 10.0
# Where nothing was learned: a model with slots is taken at its word; that a place comes later than
# it looks, since whoever comes may go before, holds at every load that was simulated.
HOME: Final = "home"
_FIRST_AT_HOME, _FIRST_ELSEWHERE = 1.0, 1.25

# (situation, distance, part of its own tenant): what an estimate was made of
Kind = tuple[str, int, int]


def kind(situation: str, position: int, num_own: int) -> Kind:
    """Distances go by powers of four: 0, 1 to 3, 4 to 15, 16 to 63, beyond. From the third on they
    are told apart by the part of its own tenant in what goes before, in quarters."""
    distance = min(4, (position.bit_length() + 1) // 2)
    return situation, distance, min(3, 4 * num_own // position) if distance > 1 else 0


@dataclass(frozen=True, slots=True)
class _Sample:
    kind: Kind
    raw_ms: float
    since_ms: int


class Calibration:
    """The factors, and the estimates whose truth is still to come."""

    def __init__(self) -> None:
        # kind -> factor, and how many truths it was learned from
        self._factors: dict[Kind, tuple[float, int]] = {}
        # arrival -> what was said of it, oldest first; at most _MAX_SAMPLES
        self._samples: dict[int, _Sample] = {}
        self._next_ms = 0

    def corrected(self, kind: Kind, raw_ms: float) -> int:
        """The estimate to give."""
        return round(raw_ms * self._factor(kind)[0])

    def wants_sample(self, now_ms: int) -> bool:
        """Whether it is time to keep one."""
        return now_ms >= self._next_ms

    def predicted(self, arrival: int, kind: Kind, raw_ms: float, now_ms: int) -> None:
        """Keep the estimate of a new request."""
        self._next_ms = now_ms + _EVERY_MS
        if len(self._samples) >= _MAX_SAMPLES:
            del self._samples[next(iter(self._samples))]
        self._samples[arrival] = _Sample(kind, raw_ms, now_ms)

    def granted(self, arrival: int, now_ms: int) -> None:
        """The truth about a request, if its estimate was kept and it had to wait."""
        sample = self._samples.pop(arrival, None)
        if sample is None or now_ms <= sample.since_ms:
            return
        factor, num = self._factor(sample.kind)
        error = log((now_ms - sample.since_ms) / max(1.0, factor * sample.raw_ms))
        factor *= exp(max(_GAIN, 1 / (num + _FIRST)) * max(-_MOST, min(_MOST, error)))
        self._factors[sample.kind] = max(_LEAST_FACTOR, min(_LARGEST_FACTOR, factor)), num + 1

    def _factor(self, kind: Kind) -> tuple[float, int]:
        known = self._factors.get(kind)
        if known is None:
            return _FIRST_AT_HOME if kind[0] == HOME else _FIRST_ELSEWHERE, 0
        return known
