"""The high-level clients of tinker 0.38 and of MinT (tinker 0.22) against real processes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.stack import Stack
from executor_svc.mock_formulas import mock_tokens
from tests.acceptance.clients import MINT_PYTHON, OWN_PYTHON, needs_mint, start_client
from tests.engine.checkpoints import make_checkpoint

SCRIPT = Path(__file__).parent / "tinker_samples.py"
VOCAB_SIZE = 32_000
PROMPT = [5, 6, 7]

both_sdks = pytest.mark.parametrize(
    "python",
    [pytest.param(OWN_PYTHON, id="0.38"), pytest.param(MINT_PYTHON, marks=needs_mint, id="0.22")],
)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    settings = {"mock_step_ms": 1, "mock_vocab_size": VOCAB_SIZE}
    with Stack.start(executor=settings) as stack:
        yield stack


def take(
    stack: Stack,
    python: Path,
    *cases: dict[str, Any],
    model: str = "mock",
    api_key: str = "tml-test",
    is_async: bool = False,
) -> Any:
    job = {"model": model, "cases": cases, "is_async": is_async}
    with start_client(stack, python, SCRIPT, api_key=api_key) as process:
        output, _ = process.communicate(json.dumps(job), timeout=60)
    assert process.returncode == 0
    return json.loads(output)


def case(prompt: list[int] = PROMPT, num_samples: int = 1, **params: Any) -> dict[str, Any]:
    return {"prompt": prompt, "num_samples": num_samples, "params": params}


def expected_tokens(num_tokens: int, *, seed: int, sample: int = 0) -> list[int]:
    return mock_tokens(
        PROMPT, seed=seed, sample=sample, start=0, stop=num_tokens, vocab_size=VOCAB_SIZE
    )


@both_sdks
def test_four_seeded_samples_come_token_for_token(stack: Stack, python: Path) -> None:
    wish = case(num_samples=4, max_tokens=20, seed=7, temperature=0.8)
    first, again = take(stack, python, wish, wish)
    for number, sequence in enumerate(first):
        tokens = expected_tokens(20, seed=7, sample=number)
        assert sequence["tokens"] == tokens
        assert sequence["logprobs"] == [-(token % 1024) / 1024 for token in tokens]
        assert sequence["stop_reason"] == "length"
    assert [x["tokens"] for x in first] == [x["tokens"] for x in again]
    if python == OWN_PYTHON:
        assert len({x["id"] for x in first + again}) == 8


@both_sdks
def test_a_stop_token_ends_a_sample_and_stays_in_it(stack: Stack, python: Path) -> None:
    tokens = expected_tokens(10, seed=7)
    (stopped,), (unstopped,) = take(
        stack,
        python,
        case(max_tokens=10, seed=7, stop=[tokens[3]]),
        case(max_tokens=10, seed=7, stop=[]),
    )
    assert (stopped["tokens"], stopped["stop_reason"]) == (tokens[:4], "stop")
    assert (unstopped["tokens"], unstopped["stop_reason"]) == (tokens, "length")


@both_sdks
def test_many_samples_at_once(stack: Stack, python: Path) -> None:
    answers = take(stack, python, *(case(max_tokens=8, seed=seed) for seed in range(200)))
    assert [answer[0]["tokens"] for answer in answers] == [
        expected_tokens(8, seed=seed) for seed in range(200)
    ]


@both_sdks
def test_coroutines_of_the_same_clients(stack: Stack, python: Path) -> None:
    cases = [case(max_tokens=8, seed=seed, num_samples=2) for seed in range(20)]
    scoring = {"prompt": PROMPT, "is_scoring": True}
    *answers, scores = take(stack, python, *cases, scoring, is_async=True)
    for seed, answer in enumerate(answers):
        tokens = [expected_tokens(8, seed=seed, sample=number) for number in range(2)]
        assert [sequence["tokens"] for sequence in answer] == tokens
    assert len(scores) == len(PROMPT)
    assert scores[0] is None


@both_sdks
def test_refusals_reach_the_user_at_once(stack: Stack, python: Path) -> None:
    (too_long,) = take(stack, python, case(prompt=[1] * 40_000, max_tokens=1))
    assert too_long["error"] == "BadRequestError"
    assert "40000" in too_long["message"]


@both_sdks
def test_an_unknown_model_is_not_found_before_any_sample(stack: Stack, python: Path) -> None:
    answer = take(stack, python, case(max_tokens=1), model="nobody/has-this")
    assert answer["error"] == "NotFoundError"


@both_sdks
def test_a_sample_whose_scheduler_dies_is_drawn_anew(python: Path) -> None:
    settings = {"mock_step_ms": 2, "mock_vocab_size": VOCAB_SIZE}
    with Stack.start(scheduler={"log_level": "debug"}, executor=settings) as stack:
        job = {"model": "mock", "cases": [case(max_tokens=1_000, seed=3)]}
        with start_client(stack, python, SCRIPT) as process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            process.stdin = None
            stack.scheduler.wait_for("request.admitted")
            port = int(stack.scheduler_address.rpartition(":")[2])
            stack.scheduler.kill()
            stack.start_scheduler({"port": port})
            output, _ = process.communicate(timeout=60)
        ((sequence,),) = json.loads(output)
        assert sequence["tokens"] == expected_tokens(1_000, seed=3)


@needs_mint
def test_mints_own_keys_are_exchanged_for_a_token(stack: Stack) -> None:
    ((sequence,),) = take(stack, MINT_PYTHON, case(max_tokens=4, seed=1), api_key="sk-mint")
    assert sequence["tokens"] == expected_tokens(4, seed=1)


def test_keys_and_tokens_are_checked_where_there_are_keys(stack: Stack) -> None:
    gateway = {
        "api_keys": "alice=tml-alice",
        "signing_key": "a signing key for tests",
        "scheduler_addresses": stack.scheduler_address,
    }
    with Stack() as keyed:
        keyed.start_gateway(gateway)
        wish = case(max_tokens=4, seed=1)
        ((sequence,),) = take(keyed, OWN_PYTHON, wish, api_key="tml-alice")
        assert sequence["tokens"] == expected_tokens(4, seed=1)
        refused = take(keyed, OWN_PYTHON, wish, api_key="tml-mallory")
        assert refused["error"] == "AuthenticationError"


def test_texts_end_samples_of_a_real_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"model": folder, "model_name": "tiny", "dtype": "float32"}
    with Stack.start(engine="torch", executor=settings) as stack:
        prompt = tokenizer.encode("The quick brown fox")
        greedy = case(prompt, max_tokens=24, temperature=0.0, stop=[])
        ((whole,),) = take(stack, OWN_PYTHON, greedy, model="tiny")
        text = re.findall(r"[ -~]{2,}", str(tokenizer.decode(whole["tokens"])))[0]
        stopping = case(prompt, max_tokens=24, temperature=0.0, stop=[text])
        ((stopped,),) = take(stack, OWN_PYTHON, stopping, model="tiny")
    tokens = stopped["tokens"]
    assert stopped["stop_reason"] == "stop"
    assert tokens == whole["tokens"][: len(tokens)]
    assert text in tokenizer.decode(tokens)
    assert text not in tokenizer.decode(tokens[:-1])
