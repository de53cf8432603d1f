"""The figures of one run, and of several seeds together.

- wait: arrival until work on it starts; of a request that never started, until it ended or the
  run did. Clients that hung up and requests refused at the door count in no wait.
- rare_max_wait: of the rare model's requests, but not of a hog's, which wait behind one another.
- goodput: requests a second of the arrival window whose first token came within the SLO, counted
  from arrival; everything offered and not good is a miss.
- fairness: service = prompt + 2 x output tokens. Of the requests that
  arrived in the first nine tenths of the window, what was done by its end; a tenant's fair share
  is its part when that service is dealt out equally, nobody more than it asked for. worst = the
  least service / fair share, Jain = (sum x)^2 / (n sum x^2). Tenants with under 5 requests are
  left out.
- ETA: what the policy said right after arrival to a request that had to wait, against the time to
  its first grant. bias = mean(said - real), also of the first, middle and last third of them, since
  a run begins with nothing learned and ends with nobody coming any more; p90 of
  |said - real| / real, share within 25 %.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bench.sim.journal import Journal, Record
from bench.sim.workload import HOG, Job

RARE = "rare"
THIRDS = ("first", "middle", "last")
_LEAST_REQUESTS = 5
Figures = dict[str, Any]


def measure(journal: Journal, jobs: list[Job], seconds: int, slo_s: float) -> Figures:
    """All figures of a run."""
    records = list(journal.records.values())
    waits = [(wait, record.job) for record in records if (wait := _wait_s(record)) is not None]
    all_waits = np.array([wait for wait, _ in waits])
    rare = [wait for wait, job in waits if job.model == RARE and job.tenant != HOG]
    good = [r for r in records if r.outcome == "OK" and _first_token_s(r) <= slo_s]
    worst, jain, shares = fairness(records, seconds)
    return {
        "num_jobs": len(jobs),
        "num_unfinished": journal.num_open,
        "outcomes": dict(Counter(record.outcome for record in records)),
        "mean_wait_s": float(all_waits.mean()),
        "p99_wait_s": float(np.quantile(all_waits, 0.99)),
        "max_wait_s": float(all_waits.max()),
        "rare_max_wait_s": max(rare, default=0.0),
        "switches": journal.counts["load"],
        "goodput": len(good) / seconds,
        "attainment": len(good) / len(records),
        "worst_share": worst,
        "jain": jain,
        "tenant_shares": shares,
        "eta": eta(records),
        "rises": dict(journal.rises),
        "num_positions": journal.num_positions,
        "counts": dict(journal.counts),
        "log_hash": journal.log_hash,
        # for the picture: a hundred points of the distribution
        "wait_quantiles_s": np.quantile(all_waits, np.linspace(0, 1, 101)).round(3).tolist(),
    }


def _wait_s(record: Record) -> float | None:
    if record.outcome == "CANCELLED" or record.outcome.startswith("rejected."):
        return None
    until_ms = record.started_ms if record.started_ms is not None else record.ended_ms
    return None if until_ms is None else (until_ms - record.job.due_ms) / 1000


def _first_token_s(record: Record) -> float:
    if record.first_token_ms is None:
        return float("inf")
    return (record.first_token_ms - record.job.due_ms) / 1000


def fairness(records: Iterable[Record], seconds: int) -> tuple[float, float, dict[str, float]]:
    """Worst service / fair share of a tenant, Jain index, and all of these shares."""
    demand: defaultdict[str, float] = defaultdict(float)
    served: defaultdict[str, float] = defaultdict(float)
    num_requests: Counter[str] = Counter()
    for record in records:
        job = record.job
        if job.due_ms > 900 * seconds:
            continue
        work = job.num_prompt_tokens + 2 * job.num_output_tokens
        num_requests[job.tenant] += 1
        demand[job.tenant] += work
        ended_ms = record.ended_ms if record.outcome == "OK" else None
        if ended_ms is not None and ended_ms <= 1000 * seconds:
            served[job.tenant] += work
    fair = deal_out(demand, sum(served.values()))
    shares = {
        tenant: served[tenant] / fair[tenant]
        for tenant in sorted(demand)
        if num_requests[tenant] >= _LEAST_REQUESTS and fair[tenant] > 0
    }
    x = np.array(list(shares.values()))
    if not x.any():
        return 0.0, 0.0, shares
    return float(x.min()), float(x.sum() ** 2 / (len(x) * (x**2).sum())), shares


def deal_out(demand: Mapping[str, float], total: float) -> dict[str, float]:
    """Equal parts of ``total``, nobody more than its demand (water filling)."""
    fair: dict[str, float] = {}
    left = total
    for num_done, (tenant, wanted) in enumerate(sorted(demand.items(), key=lambda item: item[1])):
        fair[tenant] = min(wanted, left / (len(demand) - num_done))
        left -= fair[tenant]
    return fair


def eta(records: Iterable[Record]) -> Figures | None:
    """How true the policy's estimates were; None if it gave none."""
    waited = [r for r in records if r.has_waited and r.granted_ms is not None]
    said = [
        (record.estimated_wait_ms, record.granted_ms - record.job.due_ms)
        for record in sorted(waited, key=lambda record: record.job.due_ms)
        if record.estimated_wait_ms is not None and record.granted_ms is not None
    ]
    if not said:
        return None
    estimated, real = np.array(said, dtype=float).T / 1000
    error = estimated - real
    relative = np.abs(error) / np.maximum(real, 0.001)
    return {
        "num": len(said),
        "num_unknown": len(waited) - len(said),
        "bias_s": float(error.mean()),
        **{
            f"{name}_bias_s": float(part.mean()) if len(part) else 0.0
            for name, part in zip(THIRDS, np.array_split(error, 3), strict=True)
        },
        "p90_relative_error": float(np.quantile(relative, 0.9)),
        "share_within_25_percent": float((relative <= 0.25).mean()),
    }


# --- several seeds ----------------------------------------------------------------------------

_MEANS = ("mean_wait_s", "p99_wait_s", "switches", "goodput", "attainment", "worst_share", "jain")
_WORST = ("rare_max_wait_s", "max_wait_s", "num_unfinished")


def together(runs: list[Figures]) -> Figures:
    """One row for several seeds: means, but the worst of what is a maximum."""
    row: Figures = {name: float(np.mean([run[name] for run in runs])) for name in _MEANS}
    row |= {name: max(run[name] for run in runs) for name in _WORST}
    row["num_jobs"] = sum(run["num_jobs"] for run in runs)
    row["mean_wait_sd_s"] = float(np.std([run["mean_wait_s"] for run in runs]))
    row["outcomes"] = _sum(run["outcomes"] for run in runs)
    row["rises"] = _sum(run["rises"] for run in runs)
    row["num_positions"] = sum(run["num_positions"] for run in runs)
    estimates = [run["eta"] for run in runs if run["eta"] is not None]
    row["eta"] = (
        {name: float(np.mean([e[name] for e in estimates])) for name in estimates[0]}
        if estimates
        else None
    )
    row["wait_quantiles_s"] = np.mean([run["wait_quantiles_s"] for run in runs], axis=0).tolist()
    bounds = [run["bound_s"] for run in runs if run["bound_s"] is not None]
    row["bound_s"] = max(bounds, default=None)
    row["cpu_s"] = sum(run["cpu_s"] for run in runs)
    row["policy_us"] = float(np.mean([run["policy_us"] for run in runs]))
    row["log_hashes"] = [run["log_hash"] for run in runs]
    return row


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())
