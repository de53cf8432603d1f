"""The hybrid priority: a warm model's bonus against the time somebody has waited.

Rule: ``key = arrival - E x warmth``, smallest first, where arrival is a unique number that grows
with time (``ARRIVALS_PER_MS`` of them to a millisecond, ties already broken by order of arrival),
E is aging_equalization_ms and warmth 0 to 1. All keys that move at all move alike as time passes,
so nothing is ever sorted again, and no clock is read. Rank = (band, key).

Theory: llamacpp-ha's ``priority = rate x waited + bonus x warm`` with ``rate = bonus / E`` is
``rate x (waited + E x warm)``: the same order for any bonus above 0, and only E matters. The
bonus is kept as the unit in which people read it (``points``), and as the switch: 0 is FIFO.

Warmth counts where the request could really run warm: 1 if the model is resident on an executor
that serves and drains for nobody else, 1/2 if it is only being loaded, 0 otherwise.
"""

from scheduler_svc.core.domain import CoreSettings

ARRIVAL_BITS = 10
ARRIVALS_PER_MS = 1 << ARRIVAL_BITS
# Before everything of its band: the head of a model that is nowhere yet (diversity).
FIRST_PLACE = 1 << 80
OVERDUE_BAND = -1
_NEVER_MS = 1 << 60


def arrival_number(last: int, now_ms: int) -> int:
    """The next one after ``last``."""
    return max(last + 1, now_ms * ARRIVALS_PER_MS)


def shift(settings: CoreSettings, warmth: float) -> int:
    """What warmth is worth, in arrivals."""
    if settings.is_fifo:
        return 0
    return round(settings.aging_equalization_ms * warmth * ARRIVALS_PER_MS)


def points(settings: CoreSettings, waited_ms: int, warmth: float) -> float | None:
    """The priority as people read it; None where there is none (FIFO)."""
    if settings.is_fifo:
        return None
    return settings.warm_bonus * (waited_ms / settings.aging_equalization_ms + warmth)


def band_limits_ms(settings: CoreSettings) -> list[int]:
    """For each band the wait after which a request is next, whatever its band."""
    given = settings.band_max_wait_ms or (_NEVER_MS,)
    return [given[min(band, len(given) - 1)] for band in range(settings.num_bands)]
