"""Bands: strict, except for what the later ones are owed under saturation.

Rule: band 0 goes before band 1 and so on, but a head that waited longer than its band's limit
counts as of the first band that waits, where its age decides (waking.py). While several bands
wait, each grant of one slot earns every waiting band its minimum share of a grant, and costs the
band that got it one; a band that earned a whole grant is owed the next one. A band that has nobody
waiting has nothing to claim: its credit ends. So over any busy stretch a waiting band gets its
share of the grants, less one, and debts of a band that got more than its share end at one grant:
it is never shut out for it.
"""

from collections.abc import Sequence, Sized

from scheduler_svc.core.domain import CoreSettings


class Shares:
    """What each band is owed, in grants."""

    def __init__(self, settings: CoreSettings) -> None:
        given = settings.band_min_shares[: settings.num_bands]
        self._shares = given + (0.0,) * (settings.num_bands - len(given))
        # each in [-1, 2)
        self._credits = [0.0] * settings.num_bands
        # the band that is owed most, if any is owed a whole grant
        self.owed: int | None = None

    def granted(self, band: int, waiting: Sequence[Sized]) -> None:
        """A grant is made; ``waiting``: what waits by band, the granted one as before it."""
        credits_ = self._credits
        self.owed, most = None, 1.0 - 1e-9
        for other, share in enumerate(self._shares):
            credit = credits_[other] + share if len(waiting[other]) else 0.0
            if share:
                credit = min(credit, 2.0)
                if other == band:
                    credit = max(-1.0, credit - 1.0)
            credits_[other] = credit
            if credit > most or (credit == most and self.owed is None):
                self.owed, most = other, credit
