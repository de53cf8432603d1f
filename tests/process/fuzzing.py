"""Requests that the OpenAPI document describes, and such that it does not, against real processes.

    python -m tests.process.fuzzing --cases 5000

Each answer must be one that the document promises: status, kind of content, shape, headers. A 5xx
is a fault, unless the request asked for it by a time limit. The last line is JSON.
"""

import argparse
import collections
import contextlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bench.stack import Stack

CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
GATEWAY = {"num_text_workers": 0, "tinker_hold_s": 0.2, "max_samples": 4, "max_prompts": 4}
EXECUTOR = {"mock_step_ms": 0, "max_num_seqs": 256}
_TIME_LIMITS = ("queue_timeout_s", "execution_timeout_s")
_ASKED_FOR = (503, 504)
_WORDS_OF_OURS = ("Traceback", "site-packages", ".py", "/usr/")


@dataclass
class Tally:
    """What was answered, and what was wrong."""

    num_cases: int = 0
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)


def run(stack: Stack, num_cases: int) -> Tally:
    """About so many cases, shared out to all operations, half of them valid."""
    url = stack.gateway_url
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations() if isinstance(found, Ok)]
    tally = Tally()
    num_left = num_cases
    # Those that take least come first: what they have no cases for is left to the others.
    operations.sort(key=lambda one: (bool(one.body), len(list(one.iter_parameters()))))
    for number, operation in enumerate(operations):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            before = tally.num_cases
            most = max(2, num_left // (2 * (len(operations) - number)))
            _try(operation, mode, most, url, tally)
            num_left -= tally.num_cases - before
    return tally


def _try(operation: Any, mode: GenerationMode, most: int, url: str, tally: Tally) -> None:
    @hypothesis.settings(
        max_examples=most,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            _name_a_model(case)
        response = case.call(base_url=url)
        tally.num_cases += 1
        tally.statuses[response.status_code] += 1
        try:
            case.validate_response(response, checks=[*CHECKS, *_server_checks(case, response)])
            assert not any(word in response.text for word in _WORDS_OF_OURS)
        except Exception as fault:  # schemathesis groups its failures in several classes
            text = f"{operation.label} {response.status_code}: {fault!r} {fault}"
            tally.faults.append(text[:1_500])

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # where nothing can be invalid
        one()


def _name_a_model(case: Any) -> None:
    """No generator would find the one that is served."""
    if isinstance(case.body, dict):
        for name in ("model", "base_model"):
            if isinstance(case.body.get(name), str):
                case.body[name] = "mock"


def _server_checks(case: Any, response: Any) -> list[Any]:
    body = case.body if isinstance(case.body, dict) else {}
    has_limit = any(body.get(name) for name in _TIME_LIMITS)
    is_asked_for = response.status_code in _ASKED_FOR and has_limit
    return [] if is_asked_for else [not_a_server_error]


def main() -> int:
    """0 if every answer was as it is documented, and nothing broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.process.fuzzing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", type=int, default=5_000)
    with Stack.start(gateway=GATEWAY, executor=EXECUTOR) as stack:
        tally = run(stack, parser.parse_args().cases)
        crashes = [x for x in stack.gateway.lines if x.get("level") == "error" or "text" in x]
    for fault in tally.faults[:20]:
        print(fault)
    result = {
        "cases": tally.num_cases,
        "statuses": dict(sorted(tally.statuses.items())),
        "faults": len(tally.faults),
        "crashes": len(crashes),
    }
    print(json.dumps(result))
    return 1 if tally.faults or crashes else 0


if __name__ == "__main__":
    sys.exit(main())
