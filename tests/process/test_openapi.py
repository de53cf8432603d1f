"""The OpenAPI document is true of real processes: a few cases of ``make fuzz``."""

import httpx

from bench.stack import Stack
from tests.process.fuzzing import EXECUTOR, GATEWAY, run

NUM_CASES = 200


def test_answers_are_as_documented() -> None:
    with Stack.start(gateway=GATEWAY, executor=EXECUTOR) as stack:
        tally = run(stack, NUM_CASES)
        assert not tally.faults, "\n\n".join(tally.faults[:5])
        assert tally.num_cases > NUM_CASES / 4
        assert {200, 400, 404} <= tally.statuses.keys()
        assert httpx.get(f"{stack.gateway_url}/health").status_code == 200
        errors = [x for x in stack.gateway.lines if x.get("level") == "error" or "text" in x]
        assert not errors, errors[:3]
