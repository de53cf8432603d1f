"""What goes wrong in a run, and when: a list drawn from the seed, or written by hand.

- crash: the process is gone with all it had; its connection breaks at once; it starts again.
- stall: the process stands still and hears nothing; from the shell's heartbeat timeout on its
  session counts as broken, and it attaches again when it wakes, with what it holds.
- slow: messages to and from it take ``SLOW_MS`` each way.
- drop: the connection breaks, and with it whatever was under way on it in either direction.
"""

from dataclasses import dataclass
from random import Random

SLOW_MS = 400
KINDS = ("crash", "stall", "slow", "drop")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to one executor."""

    kind: str
    executor: int
    at_ms: int
    for_ms: int


def draw_faults(num: int, num_executors: int, seconds: int, seed: int) -> list[Fault]:
    """``num`` faults of all kinds, anywhere and at any time."""
    random = Random(f"faults {seed}")
    return sorted(
        (
            Fault(
                kind=KINDS[number % len(KINDS)],
                executor=random.randrange(num_executors),
                at_ms=random.randrange(seconds * 1000),
                for_ms=random.choice((200, 2_000, 8_000, 20_000)),
            )
            for number in range(num)
        ),
        key=lambda fault: fault.at_ms,
    )
