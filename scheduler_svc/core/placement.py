"""Where a request may run: the executors, an index over them for each model, and claims.

Rule: an executor is usable for a model if it is attached, not draining, has the model resident
and has enough free slots. A lease takes min(num_samples, the executor's slots), so that every
request fits everywhere once it is empty. Of the usable ones the least loaded by used share is
taken; equal shares are taken in turn, with a turn for each model (the one that this model used
longest ago; before that, attach order).

Index: each model has a shelf of its usable executors, sorted by used slots, one row for each size
(num_slots). Inside a row the first has the most free slots, so if it is too small the whole row
is: a pick looks at one executor for each size, however many there are.

Claims: order inside a model is strict, nothing jumps over a head that needs more slots than are
free. So that other models on the same executors do not take every slot as it frees and starve
that head, it claims the executor where the fewest slots are missing: until the claim ends,
requests that rank after it get nothing there, requests that rank before it may. A claim ends when
its request is granted or gone, when a better one takes it over, or when the executor stops
serving. A model has one claim at most, an executor belongs to one at most.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from scheduler_svc.core.domain import Claim, ExecutorRecord, Rank, RequestRecord
from scheduler_svc.core.lazy_heap import LazyHeap

# (used slots, turn, executor number)
_RowKey = tuple[int, int, int]


class Shelf:
    """The usable executors of one model."""

    def __init__(self) -> None:
        # num_slots -> executors by (used, turn, number); no empty rows
        self.rows: dict[int, LazyHeap[_RowKey, str]] = {}
        # executor_id -> the row that it is in
        self._row_of: dict[str, int] = {}
        # executor_id -> number of the grant that used it last
        self._turns: dict[str, int] = {}
        self._num_turns = 0

    def put(self, executor: ExecutorRecord) -> None:
        """Enter an executor or bring its entry up to date."""
        executor_id = executor.executor_id
        if self._row_of.get(executor_id, executor.num_slots) != executor.num_slots:
            self.take(executor_id)
        self._row_of[executor_id] = executor.num_slots
        row = self.rows.get(executor.num_slots)
        if row is None:
            row = self.rows[executor.num_slots] = LazyHeap()
        turn = self._turns.get(executor_id, 0)
        row.set(executor_id, (executor.num_used, turn, executor.number))

    def take(self, executor_id: str) -> None:
        """It is not usable for now."""
        num_slots = self._row_of.pop(executor_id, None)
        if num_slots is None:
            return
        self.rows[num_slots].discard(executor_id)
        if not len(self.rows[num_slots]):
            del self.rows[num_slots]

    def had_turn(self, executor_id: str) -> None:
        """The model was just granted there."""
        self._num_turns += 1
        self._turns[executor_id] = self._num_turns

    def forget_turn(self, executor_id: str) -> None:
        """The executor is gone, or lost the model."""
        self._turns.pop(executor_id, None)

    @property
    def is_empty(self) -> bool:
        """Nothing is known about any executor."""
        return not self.rows and not self._turns


@dataclass(frozen=True, slots=True)
class Pool:
    """What a model shares with others at the moment."""

    # those that share at least one serving executor with it, itself first
    models: tuple[str, ...]
    # of its serving executors
    num_slots: int
    # some executor has it resident, does not drain, and is attached or expected back
    has_home: bool


class Fleet:
    """All executors that are attached or inside their grace."""

    def __init__(self) -> None:
        self.executors: dict[str, ExecutorRecord] = {}
        # model -> claim; the same objects as in ExecutorRecord.claim
        self.claims: dict[str, Claim] = {}
        # model -> executors that are usable for it; bounded by what the executors have resident
        self._shelves: dict[str, Shelf] = {}
        # model -> its pool; emptied when the fleet changes
        self._pools: dict[str, Pool] = {}

    def put(self, executor: ExecutorRecord) -> None:
        """Bring the index up to date after slots, state or models of an executor changed."""
        for model in executor.resident_models:
            shelf = self._shelves.get(model)
            if executor.is_serving and executor.num_free:
                if shelf is None:
                    shelf = self._shelves[model] = Shelf()
                shelf.put(executor)
            elif shelf is not None:
                shelf.take(executor.executor_id)

    def take(self, executor: ExecutorRecord) -> None:
        """Remove an executor from the index, before its models change or it is forgotten."""
        self.forget_pools()
        for model in executor.resident_models:
            shelf = self._shelves.get(model)
            if shelf is not None:
                shelf.take(executor.executor_id)
                shelf.forget_turn(executor.executor_id)
                if shelf.is_empty:
                    del self._shelves[model]

    def forget_pools(self) -> None:
        """Executors came, went, or changed what they serve."""
        self._pools.clear()

    def had_turn(self, model: str, executor: ExecutorRecord) -> None:
        """A grant of this model was made there; ``put`` follows."""
        self._shelves[model].had_turn(executor.executor_id)

    def pick(self, record: RequestRecord) -> ExecutorRecord | None:
        """The executor that a head is to be granted to now, None if it must wait."""
        best: ExecutorRecord | None = None
        best_key = (0.0, 0, 0)
        for (num_used, turn, number), executor in self._fronts(record):
            if num_missing(record, executor) <= 0:
                key = (num_used / executor.num_slots, turn, number)
                if best is None or key < best_key:
                    best, best_key = executor, key
        return best

    def choose_claim(self, record: RequestRecord) -> Claim | None:
        """The claim that a head makes which found no place, None if none makes sense.

        A head that needs one slot needs no claim: the next free slot goes by rank anyway.
        """
        if record.request.num_samples == 1:
            return None
        fronts = [executor for _, executor in self._fronts(record)]
        if not fronts:
            return None
        nearest = min(fronts, key=lambda executor: (num_missing(record, executor), executor.number))
        request = record.request
        return Claim(nearest.executor_id, request.model, request.request_id, record.rank)

    def claim(self, claim: Claim) -> None:
        """Enter a claim; the model and the executor must have none."""
        executor = self.executors[claim.executor_id]
        assert claim.model not in self.claims
        assert executor.claim is None
        self.claims[claim.model] = executor.claim = claim

    def drop_claim(self, claim: Claim) -> None:
        """End a claim."""
        del self.claims[claim.model]
        self.executors[claim.executor_id].claim = None

    def pool(self, model: str) -> Pool:
        """What a model shares; asked for known models only, so that the cache is bounded."""
        pool = self._pools.get(model)
        if pool is None:
            homes = [
                executor
                for executor in self.executors.values()
                if model in executor.resident_models and not executor.is_draining
            ]
            serving = [executor for executor in homes if executor.is_serving]
            models = {model: None} | {
                other: None for executor in serving for other in executor.resident_models
            }
            num_slots = sum(executor.num_slots for executor in serving)
            pool = self._pools[model] = Pool(tuple(models), num_slots, bool(homes))
        return pool

    def _fronts(self, record: RequestRecord) -> Iterator[tuple[_RowKey, ExecutorRecord]]:
        """The first executor of each row that is not claimed ahead of this request."""
        shelf = self._shelves.get(record.request.model)
        for row in shelf.rows.values() if shelf is not None else ():
            skipped = []
            while (first := row.peek()) is not None:
                executor = self.executors[first[1]]
                if not is_barred(executor, record.request.model, record.rank):
                    yield first[0], executor
                    break
                skipped.append(first)
                row.discard(first[1])
            for key, executor_id in skipped:
                row.set(executor_id, key)


def num_missing(record: RequestRecord, executor: ExecutorRecord) -> int:
    """Slots that must still become free there; not above 0 means that it fits."""
    return min(record.request.num_samples, executor.num_slots) - executor.num_free


def is_barred(executor: ExecutorRecord, model: str, rank: Rank) -> bool:
    """Whether another model's claim on this executor comes before this request."""
    claim = executor.claim
    return claim is not None and claim.model != model and claim.rank < rank
