"""Bands: strict, except for what the later ones are owed under saturation.

Rule: band 0 goes before band 1 and so on, but a head that waited longer than its band's limit
counts as of the first band that waits, where its age decides (waking.py). While several bands
wait, each grant of one slot earns every waiting band its minimum share of a grant, and costs the
band that got it one; a band that earned a whole grant is owed the next one. A band that has nobody
waiting has nothing to claim: its credit ends. So over any busy stretch a waiting band gets its
share of the grants, less one, and debts of a band that got more than its share end at one grant:
it is never shut out for it.
"""

from scheduler_svc.core.domain import CoreSettings


class Shares:
    """What each band is owed, in grants."""

    def __init__(self, settings: CoreSettings) -> None:
        given = settings.band_min_shares[: settings.num_bands]
        self._shares = given + (0.0,) * (settings.num_bands - len(given))
        # each in [-1, 2)
        self._credits = [0.0] * settings.num_bands

    def granted(self, band: int, waiting: list[bool]) -> None:
        """A grant was made while these bands (the granted one as before it) had waiters."""
        for other, share in enumerate(self._shares):
            if not waiting[other]:
                self._credits[other] = 0.0
            elif share:
                self._credits[other] = min(2.0, self._credits[other] + share)
        if self._shares[band]:
            self._credits[band] = max(-1.0, self._credits[band] - 1.0)

    def owed(self) -> int | None:
        """The band that is owed most, if any is owed a whole grant."""
        most = max(self._credits)
        return self._credits.index(most) if most >= 1.0 - 1e-9 else None
