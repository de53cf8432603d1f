"""What a log line looks like, and what it never holds."""

import json
import subprocess
import sys

PROGRAM = """
import structlog
from headway import logs
logs.configure("example", "info")
log = structlog.get_logger()
log.debug("request.admitted")
prompt = "canary-prompt"
try:
    raise ValueError("broken")
except ValueError:
    log.exception("call.failed", method="Submit")
"""


def test_lines_are_json_and_tracebacks_hold_no_local_variables() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    line = json.loads(run.stderr)
    assert (line["event"], line["process"], line["level"]) == ("call.failed", "example", "error")
    assert line["method"] == "Submit"
    assert "broken" in run.stderr.decode()
    assert "canary" not in run.stderr.decode()
