"""What tinker clients learn about a prompt, against a whole forward pass of transformers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.stack import Stack
from tests.acceptance.clients import MINT_PYTHON, OWN_PYTHON, needs_mint, start_client
from tests.engine.checkpoints import make_checkpoint

HERE = Path(__file__).parent
PROMPT = [(7 * i) % 90 + 5 for i in range(40)]  # two blocks of the cache and a piece
NUM_ROWS = len(PROMPT) - 1
TOLERANCE = 2e-4
ONE_TOKEN = {"max_tokens": 1}


class Served(NamedTuple):
    """A tiny model behind the whole stack, and its own logprobs [NUM_ROWS, vocabulary]."""

    stack: Stack
    logprobs: torch.Tensor


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1]
    settings = {"model": folder, "model_name": "tiny", "dtype": "float32"}
    with Stack.start(engine="torch", executor=settings) as stack:
        yield Served(stack, torch.log_softmax(logits.float(), -1))


def run(stack: Stack, python: Path, script: str, job: dict[str, Any]) -> Any:
    with start_client(stack, python, HERE / script) as process:
        output, _ = process.communicate(json.dumps(job), timeout=60)
    assert process.returncode == 0
    return json.loads(output)


def scores(served: Served, *cases: dict[str, Any]) -> Any:
    job = {"model": "tiny", "prompt": PROMPT, "cases": [{"params": ONE_TOKEN, **x} for x in cases]}
    return run(served.stack, OWN_PYTHON, "tinker_scores.py", job)


def own(served: Served) -> list[float]:
    """The logprob of each prompt token after the first."""
    rows = torch.arange(NUM_ROWS)
    return [float(x) for x in served.logprobs[rows, torch.tensor(PROMPT[1:])]]


@pytest.mark.parametrize(
    "python",
    [pytest.param(OWN_PYTHON, id="0.38"), pytest.param(MINT_PYTHON, marks=needs_mint, id="0.22")],
)
def test_compute_logprobs(served: Served, python: Path) -> None:
    job = {"model": "tiny", "cases": [{"prompt": PROMPT, "is_scoring": True}]}
    (answer,) = run(served.stack, python, "tinker_samples.py", job)
    assert answer[0] is None
    assert answer[1:] == pytest.approx(own(served), abs=TOLERANCE)


def test_likeliest_tokens_of_prompt_and_sample(served: Served) -> None:
    (answer,) = scores(
        served,
        {
            "include_prompt_logprobs": True,
            "topk_prompt_logprobs": 3,
            "topk_sample_logprobs": 2,
            "params": {"max_tokens": 4, "temperature": 0.0},
        },
    )
    assert answer["prompt_logprobs"][1:] == pytest.approx(own(served), abs=TOLERANCE)
    first, *rows = answer["topk_prompt"]
    assert first is None
    values, token_ids = served.logprobs.topk(3)
    for row, expected_ids, expected in zip(rows, token_ids.tolist(), values.tolist(), strict=True):
        assert [token_id for token_id, _ in row] == expected_ids
        assert [value for _, value in row] == pytest.approx(expected, abs=TOLERANCE)
    for token_id, logprob, row in zip(
        answer["tokens"], answer["logprobs"], answer["topk_sampled"], strict=True
    ):
        assert row[0] == [token_id, logprob]  # greedy: the likeliest is the one that was taken
        assert row[0][1] >= row[1][1]


def test_only_the_last_tokens_and_from_the_cache(served: Served) -> None:
    wish = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 1, "prompt_logprobs_last_n": 3}
    _, answer = scores(served, {}, wish)
    assert answer["prompt_logprobs"][:-3] == [None] * (len(PROMPT) - 3)
    assert answer["prompt_logprobs"][-3:] == pytest.approx(own(served)[-3:], abs=TOLERANCE)
    assert answer["topk_prompt"][:-3] == [None] * (len(PROMPT) - 3)
    assert answer["cache_hits"] == 32


def test_named_tokens_dense_and_sparse(served: Served) -> None:
    dense = [-1] * (2 * NUM_ROWS)
    dense[0], dense[11], dense[-1] = 9, 8, 7
    cells = [(0, 9), (5, 8), (NUM_ROWS - 1, 7)]
    crow = [sum(row > at for at, _ in cells) for row in range(NUM_ROWS + 1)]
    shape = [NUM_ROWS, 2]
    in_full, in_rows = scores(
        served,
        {"target_prompt_logprobs": {"data": dense, "shape": shape}},
        {
            "target_prompt_logprobs": {
                "data": [token_id for _, token_id in cells],
                "shape": shape,
                "crow": crow,
                "columns": [0, 1, 1],
            }
        },
    )
    expected = [float(served.logprobs[row, token_id]) for row, token_id in cells]
    named = in_full["targets"]["data"]
    assert [named[0], named[11], named[-1]] == pytest.approx(expected, abs=TOLERANCE)
    assert sum(value != 0 for value in named) == 3
    assert in_rows["targets"]["data"] == pytest.approx(expected, abs=TOLERANCE)
    assert in_rows["targets"]["crow"] == crow


def test_drawn_alternatives(served: Served) -> None:
    wish = {"prompt_alt_tokens_k": 5, "params": {"max_tokens": 1, "seed": 3}}
    first, again = (x["alternatives"] for x in scores(served, wish, wish))
    assert first == again
    assert first["tokens"]["shape"] == [NUM_ROWS, 5]
    tokens = torch.tensor(first["tokens"]["data"]).view(NUM_ROWS, 5)
    assert first["logprobs"]["data"] == pytest.approx(
        served.logprobs.gather(1, tokens).flatten().tolist(), abs=TOLERANCE
    )
    assert len(set(first["tokens"]["data"])) > 5


def test_nothing_is_told_that_was_not_asked(served: Served) -> None:
    (answer,) = scores(served, {})
    for name in ("prompt_logprobs", "topk_prompt", "topk_sampled", "targets", "alternatives"):
        assert answer[name] is None
    assert math.isfinite(answer["logprobs"][0])


def test_one_connection_waits_for_many_samples(served: Served) -> None:
    """Poller mode: retrieve_futures instead of one poll for each sample."""
    settings = {"scheduler_addresses": served.stack.scheduler_address, "tinker_use_poller": True}
    with Stack() as polled:
        polled.start_gateway(settings)
        cases = [
            {"prompt": PROMPT, "params": {"max_tokens": 8, "seed": i, "stop": []}}
            for i in range(20)
        ]
        answers = run(polled, OWN_PYTHON, "tinker_samples.py", {"model": "tiny", "cases": cases})
    assert [len(answer[0]["tokens"]) for answer in answers] == [8] * 20
