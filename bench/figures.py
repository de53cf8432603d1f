"""What benchmarks compute their figures with."""

import ctypes
import math
import os
import time
from collections.abc import Sequence

_LIBC = ctypes.CDLL(None)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values: the least one that so many are not above; NaN if there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, to the nanosecond; ``OSError`` if there is none.

    From the process's clock (POSIX, clock_getcpuclockid), as /proc counts in hundredths.
    """
    clock = ctypes.c_int()
    error = _LIBC.clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return time.clock_gettime(clock.value)
