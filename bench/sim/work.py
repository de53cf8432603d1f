"""What an executor was given to do."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """What a lease is to do."""

    model: str
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(slots=True)
class HeldWork:
    """A lease here; ``epoch`` and ``attempt`` change when it is adopted."""

    request_id: str
    epoch: int
    attempt: int
    work: Work
    has_started: bool = False
    has_first_token: bool = False
    has_ended: bool = False
