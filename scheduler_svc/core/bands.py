"""Bands: strict, except for what the later ones are owed under saturation.

Rule: band 0 goes before band 1 and so on, but a head that waited longer than its band's limit
counts as of the first band that waits, where its age decides (waking.py). While requests of several
bands wait for the models of an executor, each grant there earns each of those bands its minimum
share of a grant, and costs the band that got it one; a band that earned a whole grant is owed the
next one there. A band that has nobody waiting has nothing to claim: its credit ends. So over any
busy stretch of an executor a band that waits for it gets its share of the grants, less one, and
debts of a band that got more than its share end at one grant: it is never shut out for it.

A band is owed nothing where it does not compete: what the grants of one model earn a later band
could else be every slot of another model, and the earlier bands of that one would wait for ever.
So each executor keeps books of its own, a model at its limit earns nobody anything by the grants of
others, and what was earned before a model came to the executor ends then.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from scheduler_svc.core.domain import CoreSettings, ExecutorRecord

# a whole grant, but for what adding shares up may lose
_WHOLE: Final = 1.0 - 1e-9


class Shares:
    """What each band is owed by each executor, in grants."""

    def __init__(self, settings: CoreSettings) -> None:
        given = settings.band_min_shares[: settings.num_bands]
        # (band, share) of those that are promised something
        self._shares = [(band, share) for band, share in enumerate(given) if share]
        self._num_bands = settings.num_bands

    def granted(
        self,
        executor: ExecutorRecord,
        band: int,
        waiting: Sequence[Mapping[str, object]],
        barred: Collection[str] = (),
    ) -> None:
        """A grant is made there; ``waiting``: by band the models that requests wait for, the
        granted one as before it; ``barred``: models that could not have had it."""
        credits_, residences = executor.band_credits, executor.residences
        if not credits_:
            credits_ = executor.band_credits = [0.0] * self._num_bands
        owed, most = None, _WHOLE
        for other, share in self._shares:
            credit, wanted = 0.0, waiting[other]
            for model in residences:
                if model in wanted:
                    if model in barred:
                        credit = credits_[other]
                        continue
                    credit = min(credits_[other] + share, 2.0)
                    break
            if other == band:
                credit = max(-1.0, credit - 1.0)
            credits_[other] = credit
            if credit > most or (credit == most and owed is None):
                owed, most = other, credit
        executor.owed_band = owed


def model_came(executor: ExecutorRecord) -> None:
    """What bands earned with other models is not for this one."""
    executor.band_credits = [min(0.0, credit) for credit in executor.band_credits]
    executor.owed_band = None
