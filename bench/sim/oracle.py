"""``python -m bench.sim.oracle``: how true can an estimate of the wait be at all?

At some of the arrivals that have to wait the simulated world is copied (``os.fork``), and the
copies run on until that request is granted. Others keep coming for as long again after the last
request that is asked about, since no estimate can know that they cease:

- "lengths": nobody else comes, and every output is as long as it really will be. What is wrong
  here, only those who come later can make wrong.
- "chances": the rest of every output and everybody who comes later are drawn anew, many times. What
  most of these waits are close to is the best that can be said by whoever knows the whole state,
  the policy, and the distribution of all that is still to come.

Beside them stands what the policy said. Ends with one line of JSON: for each load the share within
25 %, and by how many seconds what was said was too long on the average.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from heapq import heapify, heappop
from itertools import count

import numpy as np

from bench.arguments import parser_of
from bench.sim.compare import SAMPLE_MS, Plan, jobs_of
from bench.sim.costs import PROFILES
from bench.sim.policy import make_policy
from bench.sim.workload import model_names
from bench.sim.world import World

NEAR = 0.25


class Foresight(World):
    """A world that asks copies of itself how long some requests will wait."""

    def __init__(self, plan: Plan, until_ms: int, every: int, num_draws: int) -> None:
        super().__init__(
            make_policy(plan.policy),
            plan.fleet,
            PROFILES[plan.fleet.costs_name],
            model_names(plan.num_models),
            jobs_of(plan),
            sample_ms=SAMPLE_MS,
        )
        self._until_ms = until_ms
        self._every = every
        self._draws = [jobs_of(replace(plan, seed=1_000 + seed)) for seed in range(num_draws)]
        self._num_waited = 0
        self._lengths = _Lengths([job.num_output_tokens for job in jobs_of(plan)])
        # request -> (wait with known lengths, drawn waits), ms
        self.foreseen: dict[str, tuple[int, list[int]]] = {}

    def _arrive(self, index: int) -> None:
        super()._arrive(index)
        request_id = self._jobs[index].request_id
        if request_id not in self.journal.waiting or self.now_ms >= self._until_ms:
            return
        self._num_waited += 1
        if self._num_waited % self._every == 0:
            known = _in_copy(lambda: self._wait(request_id))
            drawn = [
                _in_copy(partial(self._drawn_wait, request_id, seed))
                for seed in range(len(self._draws))
            ]
            self.foreseen[request_id] = known, drawn
            print(
                f"{len(self.foreseen)} asked about, {self.now_ms // 1000} of"
                f" {self._until_ms // 1000} s",
                flush=True,
            )

    # --- in a copy ------------------------------------------------------------------------

    def _wait(self, request_id: str) -> int:
        """Nobody else comes."""
        self._forget_arrivals()
        since_ms, record = self.now_ms, self.journal.records[request_id]
        while record.granted_ms is None:
            self.now_ms, _, act, what = heappop(self._heap)
            act(what)
        return record.granted_ms - since_ms

    def _drawn_wait(self, request_id: str, seed: int) -> int:
        """Others come, and everything ends at other times."""
        self._every = sys.maxsize
        self._draw_lengths(np.random.default_rng([seed, self.now_ms]))
        self._forget_arrivals()
        numbers = count(len(self._jobs))
        others = [
            replace(job, number=next(numbers))
            for job in self._draws[seed]
            if job.due_ms > self.now_ms
        ]
        self.journal.records |= type(self.journal)(others).records
        self._jobs = others
        self._open(None)
        since_ms, record = self.now_ms, self.journal.records[request_id]
        while record.granted_ms is None:
            self.now_ms, _, act, what = heappop(self._heap)
            act(what)
        return record.granted_ms - since_ms

    def _forget_arrivals(self) -> None:
        acts = (self._arrive, self._sample)
        self._heap = [entry for entry in self._heap if entry[2] not in acts]
        heapify(self._heap)
        self._sample_ms = None

    def _draw_lengths(self, random: np.random.Generator) -> None:
        """Of all that has not ended, given what is known: max_tokens, and what it has generated."""
        for record in self.journal.waiting.values():
            record.job = replace(
                record.job, num_output_tokens=self._lengths.draw(record.job.max_tokens, 0, random)
            )
        for executor in self.executors.values():
            executor.redraw(
                lambda request_id, num_so_far: self._lengths.draw(
                    self.journal.records[request_id].job.max_tokens, num_so_far, random
                ),
                self.now_ms,
            )
            self._settle(executor)


class _Lengths:
    """The lengths of all outputs, as whoever knows the distribution would draw from them."""

    def __init__(self, lengths: list[int]) -> None:
        self._sorted = np.sort(lengths)

    def draw(self, max_tokens: int, num_so_far: int, random: np.random.Generator) -> int:
        """One that is above what was generated so far, and not above what the client allows."""
        low, high = np.searchsorted(self._sorted, (num_so_far, max_tokens), side="right")
        return int(random.choice(self._sorted[low:high])) if low < high else max_tokens


def _in_copy(answer: Callable[[], int]) -> int:
    """The answer of a copy of this process, which leaves nothing else behind."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, str(answer()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text)


def _best_guess(waits: list[int]) -> float:
    """What most of these waits are within 25 % of."""
    drawn = np.array(waits, dtype=float)
    guesses = np.concatenate([drawn * share for share in (1 - NEAR, 1.0, 1 + NEAR)])
    is_near = np.abs(guesses[:, None] - drawn) <= NEAR * drawn
    return float(np.median(guesses[is_near.sum(axis=1) == is_near.sum(axis=1).max()]))


# real wait, and what of it was said, known with all lengths, and drawn: one row for each request
Rows = list[tuple[float, float, float, float]]


def asked(plan: Plan, until_ms: int, num_asked: int, num_draws: int) -> Rows:
    """Run a plan and ask about so many, about, of the requests that come until then."""
    num_coming = sum(job.due_ms < until_ms for job in jobs_of(plan))
    world = Foresight(plan, until_ms, max(1, num_coming // num_asked), num_draws)
    journal = world.run()
    rows = []
    for request_id, (known_ms, drawn_ms) in world.foreseen.items():
        record = journal.records[request_id]
        if record.estimated_wait_ms is not None and record.granted_ms is not None:
            said_ms = float(record.estimated_wait_ms)
            real_ms = float(record.granted_ms - record.job.due_ms)
            rows.append((real_ms, said_ms, float(known_ms), _best_guess(drawn_ms)))
    return rows


def shares(rows: Rows) -> dict[str, float]:
    """How often each guess was within 25 %, and how far what was said was off on the average."""
    real, *guesses = np.array(rows).T
    near = [round(float((np.abs(guess - real) <= NEAR * real).mean()), 3) for guess in guesses]
    return {
        "num": len(rows),
        **dict(zip(("said", "lengths", "chances"), near, strict=True)),
        "said_bias_s": round(float((guesses[0] - real).mean()) / 1000, 1),
    }


def main() -> int:
    parser = parser_of("bench.sim.oracle", __doc__)
    parser.add_argument("--load", default="30,60,80,110", help="percent of the fleet's slot time")
    parser.add_argument("--seconds", type=int, default=1_200, help="arrivals that are asked about")
    parser.add_argument("--seeds", type=int, default=3, help="1 to N")
    parser.add_argument("--asked", type=int, default=60, help="requests of a seed, about")
    parser.add_argument("--draws", type=int, default=12, help="of chances, for each request")
    arguments = parser.parse_args()
    until_ms = arguments.seconds * 1000
    loads: dict[int, dict[str, float]] = {}
    for load in map(int, arguments.load.split(",")):
        rows: Rows = []
        for seed in range(1, arguments.seeds + 1):
            plan = Plan("headway", load / 100, seed, seconds=2 * arguments.seconds)
            rows += asked(plan, until_ms, arguments.asked, arguments.draws)
            loads[load] = shares(rows)
            print(f"load {load} %, seeds 1 to {seed}: {loads[load]}", flush=True)
    print(json.dumps({"bench": "oracle", "loads": loads}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
