"""Requests that the OpenAPI document describes, and such that it does not, against real processes.

    python -m tests.process.fuzzing --cases 5000

Each answer must be one that the document promises: status, kind of content, shape, headers, and no
field that is not named there. A 5xx is a fault, unless the request asked for it by a time limit.
The last line is JSON.
"""

import argparse
import collections
import contextlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
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
_MODEL = "headway/tiny-pydoc"
_TAKE_TOKENS = ("/v1/completions", "/api/v1/asample", "/api/v1/create_sampling_session")
# what no generator would find
_GIVEN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": _MODEL, "max_completion_tokens": 2},
    "/v1/completions": {"model": _MODEL, "max_tokens": 2},
    "/v1/responses": {"model": _MODEL, "max_output_tokens": 2},
    "/tokenize": {"model": _MODEL, "prompt": "x"},
    "/detokenize": {"model": _MODEL},
    "/api/v1/asample": {"base_model": _MODEL},
    "/api/v1/create_sampling_session": {"base_model": _MODEL},
}
# and what it finds too seldom: every other call has it
_ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/api/v1/asample": {"prompt": {"chunks": [{"tokens": [1, 2]}]}, "sampling_params": {}},
}
# and what contradicts it
_EXCLUDED = {
    "/v1/chat/completions": ("max_tokens", "reasoning_effort"),
    "/tokenize": ("messages", "tools", "chat_template_kwargs", "continue_final_message"),
    "/api/v1/asample": ("sampling_session_id", "model_path"),
    "/api/v1/create_sampling_session": ("model_path",),
}
_LEAST_VOCABULARY = 4_096
_MAX_ROUNDS = 100
_TIME_LIMITS = ("queue_timeout_s", "execution_timeout_s")
_ASKED_FOR = (503, 504)
# the name of a file ends there; a token that was signed may go on after ".py"
_WORDS_OF_OURS = re.compile(r"Traceback|site-packages|\.py[^\w-]|/usr/")


@dataclass
class Tally:
    """What was answered by this document, and what was wrong."""

    document: dict[str, Any]
    num_cases: int = 0
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)


@contextlib.contextmanager
def started() -> Iterator[Stack]:
    """One model that takes token ids only, one that takes text."""
    with Stack.start(gateway=GATEWAY, executor=EXECUTOR) as stack:
        stack.start_executor({"engine": "torch"}).wait_for("executor.attached")
        yield stack


def run(stack: Stack, num_cases: int) -> Tally:
    """So many cases or a few more, shared out to all operations, half of them valid.

    Some operations have fewer different cases than their share, and those with a random part that
    is seldom right give up early: what is missing then is made up in further rounds.
    """
    url = stack.gateway_url
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    tally = Tally(document.raw_schema)
    operations = [found.ok() for found in document.get_all_operations() if isinstance(found, Ok)]
    # Those that take least come first: what they have no cases for is left to the others.
    operations.sort(key=lambda one: (bool(one.body), len(list(one.iter_parameters()))))
    for seed in range(_MAX_ROUNDS):
        for number, operation in enumerate(operations):
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                num_left = num_cases - tally.num_cases
                most = max(2, num_left // (2 * (len(operations) - number)))
                _try(operation, mode, most, url, tally, seed)
            print(f"{tally.num_cases} of {num_cases}: {operation.label}", flush=True)
        if tally.num_cases >= num_cases:
            break
    return tally


def _try(
    operation: Any, mode: GenerationMode, most: int, url: str, tally: Tally, seed: int
) -> None:
    numbers = itertools.count()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=most,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            _make_sense(case, next(numbers), tally.document)
        response = case.call(base_url=url)
        tally.num_cases += 1
        tally.statuses[response.status_code] += 1
        try:
            case.validate_response(response, checks=[*CHECKS, *_server_checks(case, response)])
            assert not _WORDS_OF_OURS.search(response.text), response.text[:200]
            extra = list(_unnamed_fields(response, operation.path, operation.method, tally))
            assert not extra, f"not in the document: {extra}"
        except Exception as fault:  # schemathesis groups its failures in several classes
            text = f"{operation.label} {response.status_code}: {fault!r} {fault}"
            tally.faults.append(text[:1_500])

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # where nothing can be invalid
        one()


def _make_sense(case: Any, number: int, document: Any) -> None:
    """No generator would find a model that is served, a key of its own, or a real place.

    Nor would it give few parameters, as people do: of many, two contradict each other.
    """
    if isinstance(case.body, dict):
        path, method = case.operation.path, case.operation.method
        content = document["paths"][path][method]["requestBody"]["content"]
        (schema,) = _leaves(document, content["application/json"]["schema"])
        required = schema.get("required", ())
        for place, name in enumerate(sorted(set(case.body) - set(required))):
            if (number + place) % 4:
                del case.body[name]
        case.body = _small(case.body)
        for name in _EXCLUDED.get(path, ()):
            case.body.pop(name, None)
        for name in {"n", "num_samples"} & set(case.body):
            case.body[name] = 1
        case.body |= _GIVEN.get(path, {})
        if number % 2 == 0:
            case.body |= _ASKS.get(path, {})
        elif path in _TAKE_TOKENS:
            case.body |= {"model" if "model" in case.body else "base_model": "mock"}
        case.headers.pop("Last-Event-ID", None)
    if "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] = f"{case.operation.label} {number}"
    if "x-headway-priority" in case.headers:
        case.headers["x-headway-priority"] = str(int(case.headers["x-headway-priority"]) % 4)


def _small(value: Any) -> Any:
    """With all whole numbers in it written as such, and inside any vocabulary."""
    if isinstance(value, list):
        return [_small(one) for one in value]
    if isinstance(value, dict):
        return {name: _small(one) for name, one in value.items()}
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
        return value
    return int(value) if abs(value) < _LEAST_VOCABULARY else int(value) % _LEAST_VOCABULARY


def _unnamed_fields(response: Any, path: str, method: str, tally: Tally) -> Iterator[str]:
    """Fields of an answer that its schema does not know, although it knows others beside them."""
    if response.headers.get("content-type", [""])[0] != "application/json":
        return
    answers = tally.document["paths"][path][method]["responses"]
    answer = _leaves(tally.document, answers[str(response.status_code)])[0]
    schema = answer["content"]["application/json"].get("schema", {})
    yield from _unnamed(tally.document, response.json(), [schema], "")


def _unnamed(document: Any, value: Any, schemas: Sequence[Any], path: str) -> Iterator[str]:
    schemas = [leaf for schema in schemas for leaf in _leaves(document, schema)]
    if isinstance(value, list):
        items = [schema["items"] for schema in schemas if "items" in schema]
        for one in value:
            yield from _unnamed(document, one, items, f"{path}[]")
    if not isinstance(value, dict) or not any("properties" in schema for schema in schemas):
        return
    for name, one in value.items():
        known = [schema.get("properties", {}).get(name) for schema in schemas]
        if not any(known):
            yield f"{path}.{name}"
        yield from _unnamed(document, one, [one for one in known if one], f"{path}.{name}")


def _leaves(document: Any, schema: Any) -> list[Any]:
    """What it refers to, each of its alternatives by itself."""
    while "$ref" in schema:
        found = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    if "anyOf" in schema:
        return [leaf for one in schema["anyOf"] for leaf in _leaves(document, one)]
    return [schema]


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
    with started() as stack:
        tally = run(stack, parser.parse_args().cases)
        crashes = [x for x in stack.gateway.lines if x.get("level") == "error" or "text" in x]
    for fault in tally.faults[:20]:
        print(fault)
    result = {
        "bench": "fuzz",
        "cases": tally.num_cases,
        "statuses": dict(sorted(tally.statuses.items())),
        "faults": len(tally.faults),
        "crashes": len(crashes),
    }
    print(json.dumps(result))
    return 1 if tally.faults or crashes else 0


if __name__ == "__main__":
    sys.exit(main())
