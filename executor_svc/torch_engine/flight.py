"""A step in flight: launched, and its results not taken in yet.

The next step may be planned then. Each sequence that goes on has a place for the token that is
being drawn, which the next step finds on the device (host_step.py).
"""

from collections.abc import Container
from dataclasses import dataclass

from executor_svc.core.batcher import Chunk
from executor_svc.core.sequence import Sequence
from executor_svc.torch_engine.host_step import PENDING
from executor_svc.torch_engine.runner import Launched, StepResult
from executor_svc.torch_engine.sampler import Row


@dataclass(frozen=True, slots=True)
class Flight:
    """What was launched."""

    chunks: list[Chunk]
    rows: list[Row]  # parallel to chunks
    launched: Launched

    @property
    def needs_landing(self) -> bool:
        """The next step cannot be planned before this one's tokens are known."""
        pairs = zip(self.chunks, self.rows, strict=True)
        return any(chunk.is_last and row.needs_text for chunk, row in pairs)

    def leave_places(self, living: Container[Sequence]) -> None:
        """For the tokens to come of sequences that live, unless their length is up then."""
        for sequence in self.launched.row_of:
            may_go_on = sequence.num_output_tokens + 1 < sequence.stops.max_tokens
            if sequence in living and may_go_on:
                sequence.token_ids.append(PENDING)

    def result(self) -> StepResult:
        """What it drew, and the places are gone; waits until the device has come that far."""
        result = self.launched.result()
        for sequence in self.launched.row_of:
            if sequence.token_ids[-1] == PENDING:
                sequence.token_ids.pop()
        return result
