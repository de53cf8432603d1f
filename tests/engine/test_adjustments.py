"""Penalties, bias and bans against a direct computation, and the alternatives beside them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from executor_svc.core.engine import SamplingParams
from executor_svc.torch_engine.sampler import Row, Sampled, SamplingBatch, sample
from tests.engine.distributions import VOCAB, assert_drawn_from, expected


def test_banned_tokens_are_not_drawn_but_keep_their_share_of_the_logprob() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    params = SamplingParams(max_tokens=9, temperature=0, min_tokens=2)
    row = Row.of(params, 0, {0})
    tokens = []
    for index in range(3):
        token, logprob, *_ = sample(logits, SamplingBatch([row], [index]))
        assert logprob.item() == pytest.approx(logits.double().log_softmax(-1)[0, token].item())
        tokens.append(int(token))
    assert tokens == [1, 1, 0]


def test_a_ban_that_takes_nearly_all_mass_leaves_a_draw_among_the_rest() -> None:
    logits = torch.tensor([[50.0, 0.0, -1.0, -50.0]])
    params = SamplingParams(max_tokens=9, temperature=0.1, min_tokens=200)
    rows = [Row.of(params, 0, {0})] * 100
    batch = SamplingBatch(rows, range(100))
    assert set(sample(logits.expand(100, -1), batch)[0].tolist()) <= {1, 2}


def _one(
    logits: torch.Tensor, params: SamplingParams, tokens: list[int], num_prompt: int
) -> Sampled:
    """The next token of one sequence, whose row has no memory."""
    row = Row.of(params, 0, ())
    texts = [(tokens, num_prompt)]
    return sample(logits[None], SamplingBatch([row], [len(tokens) - num_prompt], texts))


def _penalised(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    """By plain Python, as OpenAI's documentation and the CTRL paper have it."""
    changed = list(logits)
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        changed[token] = (
            changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
        )
    for token in set(output):
        changed[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias:
        changed[token] += bias
    return changed


@pytest.mark.parametrize(
    "adjusted",
    [
        {"presence_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.4},
        {"logit_bias": ((0, 3.0), (7, -100.0), (39, -1.5))},
        {
            "presence_penalty": 0.3,
            "frequency_penalty": 0.2,
            "repetition_penalty": 1.2,
            "logit_bias": ((3, 2.0), (30, 4.0)),
            "temperature": 0.8,
            "top_k": 25,
        },
    ],
    ids=str,
)
def test_penalties_and_bias_change_what_is_drawn(adjusted: dict[str, Any]) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(11)) * 1.5
    params = SamplingParams(max_tokens=1, **adjusted)
    prompt, output = [1, 2, 3, 3, 20], [3, 3, 4, 5, 5, 5, 20]
    changed = torch.tensor(_penalised(logits.tolist(), params, prompt, output))

    count = 5_000
    rows = [Row.of(params, i, ()) for i in range(count)]
    texts = [(prompt + output, len(prompt))] * count
    batch = SamplingBatch(rows, [len(output)] * count, texts)
    drawn = sample(logits.expand(count, -1), batch)
    assert_drawn_from(expected(changed, params), drawn.token_ids.tolist())
    # What is reported is the model's own opinion.
    reported = torch.log_softmax(logits / params.temperature, -1)[drawn.token_ids]
    torch.testing.assert_close(drawn.logprobs, reported)

    greedy = _one(logits, replace(params, temperature=0.0, top_k=0), prompt + output, len(prompt))
    assert greedy.token_ids.item() == changed.argmax()


def test_a_memory_is_a_function_of_the_tokens() -> None:
    """Step by step, at once after a move, and in other company: the same bits."""
    generator = torch.Generator().manual_seed(12)
    params = SamplingParams(
        max_tokens=99, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.3
    )
    tokens = torch.randint(0, VOCAB, (7,), generator=generator).tolist()
    row = Row.of(params, 0, ())
    other = Row.of(replace(params, logit_bias=((1, 50.0),)), 0, ())
    plain = Row.of(SamplingParams(max_tokens=99), 0, ())
    for index in range(150):  # more tokens than there are entries at first
        logits = torch.randn(3, 300, generator=generator)
        texts = [(tokens, 7), ([5, 6], 1), ([1, 2], 2)]
        batch = SamplingBatch([row, other, plain], [index, 1, 0], texts)
        drawn = sample(logits, batch)
        alone = _one(logits[0], params, tokens, 7)
        assert drawn.token_ids[0] == alone.token_ids[0]
        assert drawn.logprobs[0] == alone.logprobs[0]
        assert drawn.token_ids[1] == 1
        tokens.append(int(drawn.token_ids[0]))
    assert len(set(tokens)) > 64


def test_rows_that_ask_for_nothing_are_as_if_alone() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(13))
    plain = Row.of(SamplingParams(max_tokens=9), 0, ())
    alone = sample(logits[:1], SamplingBatch([plain], [0]))
    asking = [
        Row.of(SamplingParams(max_tokens=9, top_logprobs=4, logit_bias=((3, 9.0),)), 0, ()),
        Row.of(SamplingParams(max_tokens=9, min_tokens=5, presence_penalty=1.0), 0, (1, 2)),
    ]
    batch = SamplingBatch([plain, *asking], [0] * 3, [([1, 2], 1)] * 3)
    together = sample(logits, batch)
    assert together.token_ids[0] == alone.token_ids[0]
    assert together.logprobs[0] == alone.logprobs[0]
    assert [i for i, _ in batch.tops] == [1]


@pytest.mark.parametrize("extreme", [1e-38, 1e-9, 1e9, 3e38])
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1.0, 3e38])
def test_extreme_penalties_leave_a_draw_among_what_is_allowed(
    extreme: float, temperature: float
) -> None:
    logits = torch.tensor([3.0, -2.0, 0.5, 2.0])
    params = SamplingParams(
        max_tokens=9, repetition_penalty=extreme, temperature=temperature, min_tokens=9
    )
    row = Row.of(params, 0, (0,))
    drawn = sample(logits[None], SamplingBatch([row], [0], [([0, 1], 2)]))
    assert drawn.token_ids[0] in (1, 2, 3)
    assert drawn.logprobs.isfinite().all()


def test_alternatives_come_with_the_rows_that_ask() -> None:
    """Before penalties and cuts, at the row's temperature; as many as the vocabulary at most."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(15))
    params = [
        SamplingParams(max_tokens=9, temperature=0.7, top_logprobs=3, top_k=1),
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=9, temperature=0.0, top_logprobs=VOCAB + 9, presence_penalty=2.0),
    ]
    rows = [Row.of(one, 0, ()) for one in params]
    batch = SamplingBatch(rows, [1] * 3, [([1, 1], 1)] * 3)
    drawn = sample(logits, batch)
    assert batch.tops == [(0, 3), (2, VOCAB + 9)]
    assert drawn.top_ids is not None
    assert drawn.top_logprobs is not None
    for found, i, temperature in ((0, 0, 0.7), (1, 2, 1.0)):
        expected = torch.log_softmax(logits[i] / temperature, -1).sort(descending=True)
        assert drawn.top_ids[found].tolist() == expected.indices.tolist()
        torch.testing.assert_close(drawn.top_logprobs[found], expected.values)
    assert drawn.logprobs[0] == drawn.top_logprobs[0, 0]  # the same bits for the same token
