"""What was measured of each model: grants and leases, and since when it has no place.

Rule: everything is a pair of sums that fade together, so that a mean is one division and old
times are forgotten. Grants count only while requests wait (else a rate would be that of the
arrivals); lengths of leases fade with each later lease.
"""

from dataclasses import dataclass
from typing import Final

from scheduler_svc.core.domain import Lease

_HALF_LIFE_MS: Final = 30_000
# by which the weight of an ended lease is multiplied with each later one
_LEASE_FADING: Final = 0.95


@dataclass(slots=True)
class Meter:
    """What was measured of one model."""

    # grants out of a backlog and the backlogged time they took, fading together
    num_grants: float = 0.0
    backlogged_ms: float = 0.0
    # since when nothing was granted while requests waited; None while none waits
    since_ms: int | None = None
    # ended leases, their lengths and their lengths x slots, fading together
    num_leases: float = 0.0
    lease_ms: float = 0.0
    slot_ms: float = 0.0
    # completed leases: time, and tokens of their longest possible sample, fading together
    decode_ms: float = 0.0
    num_decoded: float = 0.0
    # since when requests wait and it has no place; None otherwise
    placeless_since_ms: int | None = None
    # when a lease last began or ended
    moved_ms: int = 0

    def granted(self, now_ms: int) -> None:
        """A request was granted; counts if it or another had to wait."""
        self.moved_ms = now_ms
        if self.since_ms is None:
            return
        elapsed = now_ms - self.since_ms
        if elapsed:
            fading = 0.5 ** (elapsed / _HALF_LIFE_MS)
            self.num_grants *= fading
            self.backlogged_ms = self.backlogged_ms * fading + elapsed
            self.since_ms = now_ms
        self.num_grants += 1

    def ended(self, lease: Lease, num_tokens: int, now_ms: int) -> None:
        """An executor gave a lease's slots back; ``num_tokens`` were generated, all samples."""
        self.moved_ms = now_ms
        elapsed = now_ms - lease.granted_ms
        self.num_leases = self.num_leases * _LEASE_FADING + 1
        self.lease_ms = self.lease_ms * _LEASE_FADING + elapsed
        self.slot_ms = self.slot_ms * _LEASE_FADING + elapsed * lease.num_slots
        if num_tokens:
            self.decode_ms = self.decode_ms * _LEASE_FADING + elapsed
            self.num_decoded = self.num_decoded * _LEASE_FADING + num_tokens / lease.num_slots
