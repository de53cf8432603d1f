"""Estimates against the truth, live: scheduler, mock executors, clients that ask where they are.

Three minutes of the simulator's synthetic arrivals (bench/sim/workload.py) over four models on two
executors that hold one model each and take two seconds to load another. Every request is submitted
as a future; what its answer says of its wait is compared with its time until the first grant, by
the same formulas as in the simulator, for those that came in the first minute, in which everything
is still to be learned, and for the others. Beside them stands what the simulator makes of the same
jobs. While a request waits it asks for its position once a second, and each rise must have a cause
in the scheduler's decision log. Ends with one line of JSON, and with exit status 1 if a rise has
none. The clients say their exact output length as max_tokens. ``--simulate N`` starts nothing and
gives the simulator's figures for N seeds together.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import uvloop
from google.protobuf.duration_pb2 import Duration

from bench.arguments import parser_of
from bench.sim.compare import SAMPLE_MS
from bench.sim.costs import PROFILES
from bench.sim.journal import CAUSES, OF_ONE_MODEL, UNEXPLAINED, Record
from bench.sim.metrics import Figures, eta
from bench.sim.policy import make_policy
from bench.sim.workload import Fleet, Job, draw, model_names
from bench.sim.world import World
from bench.stack import Process, Stack
from headway.server import connect
from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

FLEET = Fleet(num_executors=2, num_slots=4, max_models=1, load_time_ms=2_000)
NUM_MODELS = 4
POLL_S = 1.0
TELL_EVERY = 20
COLD_S = 60
_WAITING = generation_pb2.QueueStatus.STATE_WAITING

Stub = scheduler_pb2_grpc.SchedulerServiceStub


@dataclass(slots=True)
class Rises:
    """Positions that grew between two polls, and why."""

    log: Process
    num_positions: int = 0
    # (model, first and last line of the log that may tell why)
    seen: list[tuple[str, int, int]] = field(default_factory=list)

    def causes(self) -> Counter[str]:
        """Kinds of decisions that explain them; call it when the log is complete."""
        found: Counter[str] = Counter()
        for model, first, last in self.seen:
            kinds = {
                str(line["kind"])
                for line in self.log.lines[first:last]
                if line.get("event") == "decision.made"
                and line["kind"] in CAUSES
                and (line["kind"] not in OF_ONE_MODEL or line["model"] == model)
            }
            found["+".join(sorted(kinds)) or UNEXPLAINED] += 1
        return found


async def _one(stub: Stub, job: Job, began_s: float, rises: Rises) -> Record:
    """Submit a job when it is due, follow it to its end."""
    await asyncio.sleep(began_s + job.due_ms / 1000 - time.monotonic())
    request = generation_pb2.GenerationRequest(
        model=job.model,
        tenant=job.tenant,
        prompt_token_ids=range(1, 17),
        sampling=generation_pb2.SamplingParams(
            max_tokens=job.num_output_tokens, seed=job.number, ignore_eos=True
        ),
    )
    first = len(rises.log.lines)
    answer = await stub.Submit(scheduler_pb2.SubmitRequest(request=request))
    record = Record(job)
    status = answer.status
    if status.state == _WAITING:
        record.has_waited = True
        if status.HasField("estimated_wait"):
            record.estimated_wait_ms = status.estimated_wait.ToMilliseconds()
    marks, positions = [first, len(rises.log.lines)], [status.position]
    wait = Duration()
    wait.FromMilliseconds(round(POLL_S * 1000))
    while True:
        found = await stub.Retrieve(
            scheduler_pb2.RetrieveRequest(
                request_id=answer.request_id, tenant=job.tenant, wait=wait
            )
        )
        marks.append(len(rises.log.lines))
        if found.HasField("result"):
            assert not found.result.HasField("failure"), found.result.failure
            queued_ms = found.result.timing.queued.ToMilliseconds()
            record.granted_ms = job.due_ms + queued_ms
            break
        if found.pending.state == _WAITING:
            positions.append(found.pending.position)
    _note_rises(rises, job.model, positions, marks)
    return record


def _note_rises(rises: Rises, model: str, positions: list[int], marks: list[int]) -> None:
    """``marks``: length of the log before the first answer and after each; it may lag a little, so
    one poll more counts on both sides."""
    rises.num_positions += len(positions)
    for number in range(1, len(positions)):
        if positions[number] > positions[number - 1]:
            last = marks[min(number + 2, len(marks) - 1)]
            rises.seen.append((model, marks[number - 1], last))


def _jobs(load: float, seconds: int, seed: int) -> list[Job]:
    return draw(
        "synthetic",
        num_models=NUM_MODELS,
        fleet=FLEET,
        costs=PROFILES[FLEET.costs_name],
        load=load,
        seconds=seconds,
        seed=seed,
    )


async def measure(stack: Stack, load: float, seconds: int, seed: int) -> dict[str, object]:
    """Run the workload and hold what was said against what came."""
    jobs = _jobs(load, seconds, seed)
    rises = Rises(stack.scheduler)
    async with connect(stack.scheduler_address, max_message_bytes=1 << 24) as channel:
        stub, began_s = Stub(channel), time.monotonic()
        print(f"{len(jobs)} requests will come", flush=True)
        tasks = [asyncio.create_task(_one(stub, job, began_s, rises)) for job in jobs]
        for number, task in enumerate(asyncio.as_completed(tasks), 1):
            await task
            if number % TELL_EVERY == 0:
                passed_s = time.monotonic() - began_s
                print(f"{passed_s:.0f} s: {number} of {len(jobs)} ended", flush=True)
    records = [task.result() for task in tasks]
    waits = [r.granted_ms - r.job.due_ms for r in records if r.granted_ms is not None]
    causes = rises.causes()
    return {
        "num_requests": len(jobs),
        "mean_wait_s": round(sum(waits) / len(waits) / 1000, 3),
        "live": _cold_and_warm(records),
        "simulated": _cold_and_warm(_simulated(jobs)),
        "num_positions": rises.num_positions,
        "num_rises": sum(causes.values()),
        "num_unexplained_rises": causes[UNEXPLAINED],
        "causes": dict(causes.most_common(8)),
    }


def _cold_and_warm(records: Iterable[Record]) -> dict[str, Figures | None]:
    """Those that came while everything was still to be learned, and the others."""
    parts: dict[str, list[Record]] = {"cold": [], "warm": []}
    for record in records:
        parts["cold" if record.job.due_ms < COLD_S * 1000 else "warm"].append(record)
    return {name: eta(part) for name, part in parts.items()}


def _simulated(jobs: list[Job]) -> list[Record]:
    """The same jobs in the simulator."""
    policy, costs = make_policy("headway"), PROFILES[FLEET.costs_name]
    models = model_names(NUM_MODELS)
    world = World(policy, FLEET, costs, models, jobs, sample_ms=SAMPLE_MS)
    return list(world.run().records.values())


def main() -> int:
    """0 if every rise of a position was explained."""
    parser = parser_of("bench.eta", __doc__)
    parser.add_argument("--load", type=int, default=70, help="percent of the slot time")
    parser.add_argument("--seconds", type=int, default=180, help="length of the arrivals")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--simulate", type=int, default=0, help="seeds 1 to N, no processes")
    arguments = parser.parse_args()
    load = arguments.load / 100
    if arguments.simulate:
        seeds = range(1, arguments.simulate + 1)
        records = []
        for seed in seeds:
            records += _simulated(_jobs(load, arguments.seconds, seed))
            print(f"seed {seed} of {arguments.simulate}", flush=True)
        about = {"bench": "eta", "load": load, "seeds": arguments.simulate}
        print(json.dumps({**about, "simulated": _cold_and_warm(records)}))
        return 0
    executor = {
        "max_models": FLEET.max_models,
        "max_num_seqs": FLEET.num_slots,
        "mock_models": ",".join(model_names(NUM_MODELS)),
        "mock_load_ms": FLEET.load_time_ms,
        "mock_step_ms": PROFILES[FLEET.costs_name].step_ms,
    }
    with Stack.start(
        executors=FLEET.num_executors,
        scheduler={"has_decision_log": True},
        executor=executor,
        has_gateway=False,
    ) as stack:
        figures = uvloop.run(measure(stack, load, arguments.seconds, arguments.seed))
    print(json.dumps({"bench": "eta", "load": load, "seed": arguments.seed, **figures}))
    return 1 if figures["num_unexplained_rises"] else 0


if __name__ == "__main__":
    sys.exit(main())
