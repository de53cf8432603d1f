"""Where related work ran before: sessions, and prefixes that an executor's cache may still hold.

Rule: both are hints. They name executors that may be gone, full or drained by now; placement
asks, and takes the advice only as far as it saves work. Both forget: nothing here grows with time.

Sessions are scoped by tenant, so nobody can adopt another's by guessing its id, and by model,
since a cache is one model's. A follow-up that was served by the preferred executor is a hit; one
served elsewhere is a miss of the preferred one, and the new one is preferred from then on.

Prefixes are known by chained block hashes: each hash covers its block and all blocks before it, so
two prompts share a hash only if they share the whole prefix up to there, never because they have
one block in common. A block's executors are one int used as a set of bits.
"""

from dataclasses import dataclass
from typing import Final

from scheduler_svc.core import counts
from scheduler_svc.core.answers import SessionTotals
from scheduler_svc.core.recency import Link, Recency

# An answer names no more executors than this, those with the longest prefix first.
MAX_HITS: Final = 32
_NUM_DEAD_KEPT: Final = 64

_SessionName = tuple[str, str, str]  # (tenant, session_id, model)


@dataclass(slots=True)
class Tally:
    """How often an executor that was preferred also served."""

    num_hits: int = 0
    num_misses: int = 0


class Session(Link):
    """What is known of one session."""

    __slots__ = ("executor_id", "name", "served_ms")

    def __init__(self, name: _SessionName) -> None:
        super().__init__()
        self.name = name
        # who served it last, and when
        self.executor_id = ""
        self.served_ms = 0


class Sessions:
    """Session -> the executor that served it last; at most max_sessions, idle ones expire."""

    def __init__(self, ttl_ms: int, max_sessions: int) -> None:
        assert max_sessions > 0
        self._ttl_ms = ttl_ms
        self._max_sessions = max_sessions
        self._sessions: dict[_SessionName, Session] = {}
        # longest idle first
        self._recency = Recency()
        # of executors that served a session and were not dropped since
        self._tallies: dict[str, Tally] = {}
        # of all executors since the start
        self._total = Tally()
        self.num_by_model: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def preferred(self, tenant: str, session_id: str, model: str, now_ms: int) -> str | None:
        """The executor that may still hold this session's cache; None if none is known."""
        known = self._sessions.get((tenant, session_id, model))
        if known is None or now_ms - known.served_ms >= self._ttl_ms:
            return None
        return known.executor_id

    def served(
        self, tenant: str, session_id: str, model: str, executor_id: str, now_ms: int
    ) -> None:
        """A request of the session succeeded there; no session (empty id) changes nothing."""
        if not session_id:
            return
        tally = self._tallies.get(executor_id)
        if tally is None:
            tally = self._tallies[executor_id] = Tally()
        name = (tenant, session_id, model)
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = Session(name)
            counts.change(self.num_by_model, model, 1)
        elif now_ms - session.served_ms < self._ttl_ms:
            self._judge(session.executor_id, executor_id, tally)
        session.executor_id, session.served_ms = executor_id, now_ms
        self._recency.used(session)
        self._trim(now_ms)

    def _judge(self, preferred: str, executor_id: str, tally: Tally) -> None:
        """A preferred executor served, or another one did."""
        if preferred == executor_id:
            tally.num_hits += 1
            self._total.num_hits += 1
            return
        self._total.num_misses += 1
        missed = self._tallies.get(preferred)
        if missed is not None:
            missed.num_misses += 1

    def tally(self, executor_id: str) -> Tally:
        """Hits and misses of an executor since it is known."""
        return self._tallies.get(executor_id) or Tally()

    def drop_executor(self, executor_id: str) -> None:
        """It is gone for good: its tally goes too."""
        self._tallies.pop(executor_id, None)

    def _trim(self, now_ms: int) -> None:
        # never empty here: the one that was just served stays
        while True:
            oldest = self._recency.oldest
            assert isinstance(oldest, Session)
            idle_ms = now_ms - oldest.served_ms
            is_over = len(self._sessions) > self._max_sessions
            if not is_over and (not idle_ms or idle_ms < self._ttl_ms):
                return
            self._recency.remove(oldest)
            del self._sessions[oldest.name]
            counts.change(self.num_by_model, oldest.name[2], -1)

    def totals(self) -> SessionTotals:
        """Of all sessions."""
        return SessionTotals(len(self), self._total.num_hits, self._total.num_misses)


class Stretch(Link):
    """Blocks that follow one another in a chain, with the same executors and the same last use."""

    __slots__ = ("bits", "blocks")

    def __init__(self, blocks: tuple[int, ...]) -> None:
        super().__init__()
        # never empty
        self.blocks = blocks
        # who has them, dropped executors included
        self.bits = 0

    def num_common(self, prefix: tuple[int, ...], at: int) -> int:
        """How many of its blocks stand in a prompt, one after another from a place on."""
        blocks, most = self.blocks, min(len(self.blocks), len(prefix) - at)
        if prefix[at : at + most] == blocks[:most]:
            return most
        num = 0
        while blocks[num] == prefix[at + num]:
            num += 1
        return num


class PrefixIndex:
    """Block hash -> executors; at most max_blocks, those longest not added go first.

    Most blocks of a chain are added together again and again, so what is kept for each block is
    kept once for a stretch of them, which is cut where prompts part.
    """

    def __init__(self, max_blocks: int) -> None:
        assert max_blocks > 0
        self._max_blocks = max_blocks
        self._stretches: dict[int, Stretch] = {}
        # the end of a chain before its beginning
        self._recency = Recency()
        # executor_id -> position of its bit, and back
        self._positions: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._free_positions: list[int] = []
        # bits of dropped executors, still set in some stretches
        self._dead = 0
        self._num_dead = 0

    def __len__(self) -> int:
        return len(self._stretches)

    def add(self, executor_id: str, prefix_hashes: tuple[int, ...]) -> None:
        """An executor computed a prompt with these blocks, shortest prefix first."""
        if not prefix_hashes:
            return
        bit, dead = 1 << self._position(executor_id), self._dead
        touched: list[Stretch] = []
        at, end = 0, len(prefix_hashes)
        while at < end:
            stretch = self._starting(prefix_hashes, at)
            if dead:
                stretch.bits &= ~dead
            stretch.bits |= bit
            touched.append(stretch)
            at += len(stretch.blocks)
        # the first block last, so that a chain loses its end before its beginning
        touched.reverse()
        for stretch in touched:
            self._recency.used(stretch)
        self._trim()

    def _starting(self, prefix: tuple[int, ...], at: int) -> Stretch:
        """The stretch that is what a prompt has from a place on, as far as it goes; cut to that
        length or made if need be."""
        stretch = self._stretches.get(prefix[at])
        if stretch is None:
            return self._new(prefix, at)
        if stretch.blocks[0] != prefix[at]:  # no chain: hashes that are equal by chance
            self._cut(stretch, stretch.blocks.index(prefix[at]))
        num = stretch.num_common(prefix, at)
        return stretch if num == len(stretch.blocks) else self._cut(stretch, num)

    def _new(self, prefix: tuple[int, ...], at: int) -> Stretch:
        stretch, end = Stretch(()), at
        while end < len(prefix) and prefix[end] not in self._stretches:
            self._stretches[prefix[end]] = stretch
            end += 1
        stretch.blocks = prefix[at:end]
        self._recency.used(stretch)
        return stretch

    def _cut(self, stretch: Stretch, num: int) -> Stretch:
        """Make the first blocks of a stretch one of their own."""
        first = Stretch(stretch.blocks[:num])
        first.bits = stretch.bits
        stretch.blocks = stretch.blocks[num:]
        for block in first.blocks:
            self._stretches[block] = first
        self._recency.put_after(first, stretch)
        return first

    def _trim(self) -> None:
        while (num_over := len(self._stretches) - self._max_blocks) > 0:
            oldest = self._recency.oldest
            assert isinstance(oldest, Stretch)
            num_kept = max(0, len(oldest.blocks) - num_over)
            for block in oldest.blocks[num_kept:]:
                del self._stretches[block]
            oldest.blocks = oldest.blocks[:num_kept]
            if not num_kept:
                self._recency.remove(oldest)

    def has_any(self, executor_id: str, prefix_hashes: tuple[int, ...]) -> bool:
        """Whether an executor has the first of these blocks, at least."""
        position = self._positions.get(executor_id)
        if position is None or not prefix_hashes:
            return False
        stretch = self._stretches.get(prefix_hashes[0])
        return stretch is not None and bool(stretch.bits >> position & 1)

    def longest(self, prefix_hashes: tuple[int, ...]) -> dict[str, int]:
        """Executor -> how many leading blocks it has, for those that have any; longest first."""
        having, num_blocks = ~self._dead, 0
        # (number of blocks, who has exactly so many)
        steps: list[tuple[int, int]] = []
        while having and num_blocks < len(prefix_hashes):
            stretch = self._stretches.get(prefix_hashes[num_blocks])
            still = 0 if stretch is None else having & stretch.bits
            if still != having and num_blocks:
                steps.append((num_blocks, having ^ still))
            having = still
            if stretch is not None:
                num_blocks += max(1, stretch.num_common(prefix_hashes, num_blocks))
        if having and num_blocks:
            steps.append((num_blocks, having))
        found: dict[str, int] = {}
        for num_blocks, bits in reversed(steps):
            while bits and len(found) < MAX_HITS:
                position = bits.bit_length() - 1
                found[self._names[position]] = num_blocks
                bits ^= 1 << position
        return found

    def drop_executor(self, executor_id: str) -> None:
        """Its cache is gone: the process ended, or the model left its device."""
        position = self._positions.pop(executor_id, None)
        if position is None:
            return
        del self._names[position]
        self._dead |= 1 << position
        self._num_dead += 1
        if self._num_dead > len(self._positions) + _NUM_DEAD_KEPT:
            self._bury()

    def _position(self, executor_id: str) -> int:
        position = self._positions.get(executor_id)
        if position is None:
            if self._free_positions:
                position = self._free_positions.pop()
            else:
                position = len(self._positions) + self._num_dead
            self._positions[executor_id] = position
            self._names[position] = executor_id
        return position

    def _bury(self) -> None:
        """Clear all dead bits at once; rare, because it looks at every stretch."""
        alive = ~self._dead
        for stretch in self._recency.all():
            assert isinstance(stretch, Stretch)
            stretch.bits &= alive
        while self._dead:
            position = self._dead.bit_length() - 1
            self._free_positions.append(position)
            self._dead ^= 1 << position
        self._num_dead = 0
