"""Who asks for what, and when: drawn once from a seed, and the same for every policy.

Rule: a workload is a list of jobs in order of arrival. Arrivals, lengths, tenants, models and
impatience come from generators of their own, so that changing one leaves the others as they were
(common random numbers). A load is a share of the fleet: slot time asked for / slot time there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.sim.costs import Costs
from bench.sim.traces import Row, read_trace

HOG = "hog"
# The rare model asks for this share of the requests.
RARE_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a client, with the output length that only the simulator knows."""

    number: int
    due_ms: int
    tenant: str
    model: str
    num_prompt_tokens: int
    num_output_tokens: int
    # what the client says: the core sees this instead of the output length
    max_tokens: int
    # the client gives up so long after arrival; None: never
    patience_ms: int | None = None

    @property
    def request_id(self) -> str:
        """Its name in the core."""
        return f"r{self.number}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """The executors of a run, all alike."""

    num_executors: int = 4
    num_slots: int = 4
    max_models: int = 1
    load_time_ms: int = 8_000
    costs_name: str = "mock"
    engine: str = "slot"

    @property
    def num_fleet_slots(self) -> int:
        """Seats of all executors."""
        return self.num_executors * self.num_slots


def model_names(num_models: int) -> list[str]:
    """The last one is the rare one."""
    return [*(f"m{number}" for number in range(num_models - 1)), "rare"]


def popularity(num_models: int) -> np.ndarray:
    """Zipf with exponent 1 over all but the last model, which gets RARE_SHARE."""
    if num_models == 1:
        return np.ones(1)
    common = 1 / np.arange(1, num_models)
    return np.append(common / common.sum() * (1 - RARE_SHARE), RARE_SHARE)


def draw(
    trace: str, *, num_models: int, fleet: Fleet, costs: Costs, load: float, seconds: int, seed: int
) -> list[Job]:
    """Jobs that arrive within ``seconds`` and ask for ``load`` of the fleet on the average."""
    rows = _synthetic(trace, seed) if trace in SYNTHETIC else read_trace(trace)
    rows = _rescale(rows, fleet, costs, load, seconds)
    models = np.array(model_names(num_models))
    chosen = _stream(seed, "models").choice(models, size=len(rows), p=popularity(num_models))
    slack = _stream(seed, "limits").integers(1, 5, size=len(rows))
    return [
        Job(
            number=number,
            due_ms=round(row.at_s * 1000),
            tenant=row.tenant,
            model=str(chosen[number]),
            num_prompt_tokens=row.num_prompt_tokens,
            num_output_tokens=row.num_output_tokens,
            max_tokens=row.num_output_tokens * int(slack[number]),
        )
        for number, row in enumerate(rows)
    ]


def with_impatience(jobs: Sequence[Job], share: float, mean_s: float, seed: int) -> list[Job]:
    """Some clients hang up after an exponential time."""
    random = _stream(seed, "patience")
    leaves = random.random(len(jobs)) < share
    patience_ms = np.ceil(random.exponential(mean_s * 1000, len(jobs))).astype(int)
    return [
        replace(job, patience_ms=int(patience_ms[i])) if leaves[i] else job
        for i, job in enumerate(jobs)
    ]


def _stream(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each purpose."""
    return np.random.default_rng([seed, *name.encode()])


def _rescale(rows: list[Row], fleet: Fleet, costs: Costs, load: float, seconds: int) -> list[Row]:
    """Stretch the time between rows until they ask for ``load``; a trace too short starts again.

    The shape of the arrivals stays (their CV, their bursts), the speed changes.
    """
    batch = fleet.num_slots
    work_ms = sum(costs.service_ms(r.num_prompt_tokens, r.num_output_tokens, batch) for r in rows)
    # so that a trace that starts again does so after its mean gap
    span_s = rows[-1].at_s - rows[0].at_s + (rows[-1].at_s - rows[0].at_s) / max(1, len(rows) - 1)
    stretch = work_ms / 1000 / (load * fleet.num_fleet_slots) / span_s
    start_s = rows[0].at_s
    scaled: list[Row] = []
    for lap in range(1 + int(seconds / (span_s * stretch))):
        for row in rows:
            at_s = (row.at_s - start_s + lap * span_s) * stretch
            if at_s >= seconds:
                return scaled
            scaled.append(replace(row, at_s=at_s))
    return scaled


# --- made-up traffic ------------------------------------------------------------------------

# name -> (tenants and their share of the arrivals, CV of the time between arrivals)
SYNTHETIC: dict[str, tuple[dict[str, float], float]] = {
    "synthetic": ({f"t{n}": 1 / (n + 1) for n in range(8)}, 1.0),
    "bursty": ({f"t{n}": 1 / (n + 1) for n in range(8)}, 4.0),
    # One tenant asks a hundred times as often as each of five others. At 1000 % load they ask for
    # half of the fleet, and in order of arrival they would get a tenth of what they ask for.
    "hog": ({HOG: 100.0} | {f"t{n}": 1.0 for n in range(5)}, 1.0),
}
_NUM_ROWS = 20_000


def _synthetic(name: str, seed: int) -> list[Row]:
    """Gamma arrivals (Poisson where the CV is 1) at 1 a second, lognormal lengths.

    Medians and spreads are those of azure2023_conv (shared/traces/README.md): input p50 1042 and
    p90 2374, output p50 202 and p90 429, from which sigma = ln(p90 / p50) / 1.2816.
    """
    shares, cv = SYNTHETIC[name]
    shape = 1 / cv**2
    at_s = np.cumsum(_stream(seed, "arrivals").gamma(shape, 1 / shape, _NUM_ROWS))
    lengths = _stream(seed, "lengths")
    prompts = np.clip(lengths.lognormal(np.log(1042), 0.642, _NUM_ROWS), 1, 32_000)
    outputs = np.clip(lengths.lognormal(np.log(202), 0.588, _NUM_ROWS), 1, 4_096)
    weights = np.array(list(shares.values()))
    tenants = _stream(seed, "tenants").choice(
        np.array(list(shares)), size=_NUM_ROWS, p=weights / weights.sum()
    )
    return [
        Row(float(at_s[i]), str(tenants[i]), int(prompts[i]), int(outputs[i]))
        for i in range(_NUM_ROWS)
    ]
