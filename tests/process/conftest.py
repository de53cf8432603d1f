"""What a failed test of real processes shows besides its assertion: what the processes said."""

from collections.abc import Generator

import pytest

from bench.stack import Process

_MAX_LINES = 50  # of each process, the last ones


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the complaints of all processes that are in use."""
    report = yield
    if report.failed:
        for process in sorted(Process.started, key=lambda process: process.pid):
            text = "\n".join(str(line) for line in process.complaints[-_MAX_LINES:])
            report.sections.append(
                (f"{process.name}, process {process.pid}", text or "all is well")
            )
    return report
