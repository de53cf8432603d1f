"""The hybrid priority: a warm model's bonus against the time somebody has waited.

Rule: ``key = arrival - E x warmth``, smallest first, where arrival is a unique number that grows
with time (``ARRIVALS_PER_MS`` of them to a millisecond, ties already broken by order of arrival),
E is aging_equalization_ms and warmth 0 to 1. All keys that move at all move alike as time passes,
so nothing is ever sorted again, and no clock is read. Rank = (band, key).

Theory: llamacpp-ha's ``priority = rate x waited + bonus x warm`` with ``rate = bonus / E`` is
``rate x (waited + E x warm)``: the same order for any bonus above 0, and only E matters. The
bonus is kept as the unit in which people read it (``points``), and as the switch: 0 is FIFO.

A model that needs one more place competes for it by its claim (``claim``): the sum of the waits of
its requests over the places that it would have. That is what the executor can save there, as in
the longest-queue-first and max-weight rules of polling systems (Tassiulas and Ephremides, 1992;
Levy, Sidi and Boxma, 1990), and it needs no second clock: it grows with the backlog and with time.

Warmth counts where the request could really run warm: 1 if the model is resident on an executor
that serves and drains for nobody else, 1/2 if it is only being loaded, 0 otherwise.
"""

from typing import Final

from scheduler_svc.core.domain import CoreSettings

ARRIVAL_BITS: Final = 10
ARRIVALS_PER_MS: Final = 1 << ARRIVAL_BITS
# A model that is nowhere yet counts as so many times warm (diversity) ...
_FIRST_PLACE: Final = 2.0
# ... and before everything of its band once it is due.
_AGED: Final = 1 << 80
_NEVER_MS: Final = 1 << 60


def arrival_number(last: int, now_ms: int) -> int:
    """The next one after ``last``."""
    return max(last + 1, now_ms * ARRIVALS_PER_MS)


def aging(settings: CoreSettings) -> int:
    """E in arrivals."""
    return settings.aging_equalization_ms * ARRIVALS_PER_MS


def shift(settings: CoreSettings, warmth: float) -> int:
    """What warmth is worth, in arrivals."""
    if settings.is_fifo:
        return 0
    return round(settings.aging_equalization_ms * warmth * ARRIVALS_PER_MS)


def claim(
    settings: CoreSettings,
    head_waited_ms: int,
    all_waited_ms: int,
    num_places: int,
    placeless_ms: int,
) -> int:
    """What a model's need for one more place is worth beyond its head's age, in arrivals.

    The claim is the sum of the waits of its requests over the places that it would have then: it
    grows with the backlog and, for one lonely request, with its age. A first place counts E more
    than another one, and after E it is due: such models take turns, whoever is ``placeless_ms`` for
    longest first. By the age of their heads, one that gets a place and loses it again with the same
    old backlog would go before a rare model for ever.
    """
    if not num_places and placeless_ms >= settings.aging_equalization_ms:
        return _AGED + (placeless_ms - head_waited_ms) * ARRIVALS_PER_MS
    lead = shift(settings, 1.0 if num_places else _FIRST_PLACE)
    return lead + round((all_waited_ms / (num_places + 1) - head_waited_ms) * ARRIVALS_PER_MS)


def points(settings: CoreSettings, waited_ms: int, warmth: float) -> float | None:
    """The priority as people read it; None where there is none (FIFO)."""
    if settings.is_fifo:
        return None
    return settings.warm_bonus * (waited_ms / settings.aging_equalization_ms + warmth)


def band_limits_ms(settings: CoreSettings) -> list[int]:
    """For each band the wait after which a request counts as of the first band."""
    given = settings.band_max_wait_ms or (_NEVER_MS,)
    return [given[min(band, len(given) - 1)] for band in range(settings.num_bands)]
