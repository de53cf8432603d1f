"""Leases of one executor session, and where the tokens of each of their handles go."""

from dataclasses import dataclass

from headway.v1 import fleet_pb2 as fleet
from scheduler_svc.outputs import Output


@dataclass(eq=False, slots=True)
class Lease:
    """A lease on one session. ``handle`` names its first sample, the others follow."""

    request_id: str
    epoch: int
    attempt: int
    handle: int
    output: Output
    has_started: bool = False
    is_muted: bool = False

    def ref(self) -> fleet.LeaseRef:
        """Its name on the wire."""
        return fleet.LeaseRef(request_id=self.request_id, epoch=self.epoch, attempt=self.attempt)


class Route:
    """Where the tokens of one handle go; no token may come at or past ``limit``."""

    __slots__ = (
        "lease",
        "limit",
        "logprobs",
        "num_top",
        "sample",
        "token_ids",
        "top_logprobs",
        "top_token_ids",
        "vocab_size",
    )

    def __init__(self, lease: Lease, sample: int) -> None:
        output = lease.output
        self.lease = lease
        self.sample = sample
        self.token_ids = output.token_ids[sample]
        self.logprobs = output.logprobs[sample] if output.logprobs is not None else None
        self.num_top = output.num_top
        self.top_token_ids = output.top_token_ids[sample]
        self.top_logprobs = output.top_logprobs[sample]
        self.vocab_size = output.vocab_size
        self.limit = 0
        self.set_limit()

    def set_limit(self) -> None:
        """By what the output says now."""
        output = self.lease.output
        if output.lacks_scores or output.ends[self.sample] is not None:
            self.limit = len(self.token_ids)
        else:
            self.limit = output.max_tokens
