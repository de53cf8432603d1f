"""What benchmarks compute their figures with."""

import math
from collections.abc import Sequence

import psutil


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values: the least one that so many are not above; NaN if there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
