"""Philox against its published vectors; cuts and draws against a direct computation."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.core.engine import SamplingParams
from executor_svc.torch_engine.draws import philox, top_tokens, top_tokens_by_keys, uniforms
from executor_svc.torch_engine.sampler import Row, Sampled, SamplingBatch, sample

VOCAB = 40
NUM_DRAWS = 20_000
ALL_ONES = 0xFFFFFFFF

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ALL_ONES] * 4, [ALL_ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def _draws(logits: torch.Tensor, params: SamplingParams, count: int = NUM_DRAWS) -> torch.Tensor:
    """Tokens number 0 .. count - 1 of one sequence whose logits never change."""
    rows = [Row.of(params, 0, ())] * count
    batch = SamplingBatch(rows, range(count))
    return sample(logits.expand(count, -1), batch)[0]


def _expected(logits: torch.Tensor, params: SamplingParams) -> list[float]:
    """The distribution by plain Python: sort, cut, normalise."""
    probs = torch.softmax(logits.double() / params.temperature, -1).tolist()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    if params.top_k:
        ranked = ranked[: params.top_k]
    total = sum(probs[token] for token in ranked)
    sums = itertools.accumulate((probs[token] for token in ranked), initial=0.0)
    ranked = [t for t, mass in zip(ranked, sums, strict=False) if mass < params.top_p * total]
    kept = {t for t in ranked if probs[t] >= params.min_p * probs[ranked[0]]}
    total = sum(probs[token] for token in kept)
    return [prob / total if token in kept else 0.0 for token, prob in enumerate(probs)]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    # Twice in one call: rows do not mix.
    result = philox(torch.tensor([counter, counter]), torch.tensor([key, key]))
    assert result.tolist() == [words, words]


def test_uniforms_are_in_the_unit_interval() -> None:
    counter = torch.zeros(10_000, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(10_000)
    u = uniforms(counter, torch.tensor([[1, 2]]).expand(10_000, 2))
    assert u.dtype == torch.float64
    assert 0 <= u.min() < u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=1, seed=3),
        SamplingParams(max_tokens=1, temperature=0.5),
        SamplingParams(max_tokens=1, temperature=2.5),
        SamplingParams(max_tokens=1, top_k=1),
        SamplingParams(max_tokens=1, top_k=7),
        SamplingParams(max_tokens=1, top_k=VOCAB + 5),
        SamplingParams(max_tokens=1, top_p=0.6),
        SamplingParams(max_tokens=1, top_p=1e-9),
        SamplingParams(max_tokens=1, min_p=0.2),
        SamplingParams(max_tokens=1, min_p=1.0),
        SamplingParams(max_tokens=1, top_k=9, top_p=0.7, min_p=0.1, temperature=1.3),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5
    counts = Counter(_draws(logits, params).tolist())
    for token, prob in enumerate(_expected(logits, params)):
        spread = math.sqrt(NUM_DRAWS * prob * (1 - prob))
        assert abs(counts[token] - NUM_DRAWS * prob) <= 4.5 * spread, (token, prob)


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 9000])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 3.0])
@pytest.mark.parametrize("top_p", [1e-30, 0.3, 0.999999])
def test_a_nucleus_is_exact_however_wide_it_is(vocab: int, spread: float, top_p: float) -> None:
    """Flat rows and peaked ones, whose nucleus is found without sorting all of them."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(9)) * spread
    probs = torch.softmax(logits, -1)
    ranked = probs.sort(descending=True).values
    before = ranked.cumsum(-1, dtype=torch.float64) - ranked
    least = ranked[int((before < top_p * ranked.sum(dtype=torch.float64)).sum()) - 1]
    drawn = _draws(logits, SamplingParams(max_tokens=1, top_p=top_p), count=200)
    assert (probs[drawn] >= least * (1 - 1e-6)).all()
    if spread == 0.0 or top_p > 0.9:
        assert len(set(drawn.tolist())) > min(vocab - 1, 2)


EXTREME_CUTS = [{}, {"top_k": 1}, {"top_k": 1 << 31}, {"top_p": 1e-38}, {"min_p": 1.0}]


@pytest.mark.parametrize("cut", EXTREME_CUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e-5, 1.0, 1e5, 3e38])
@pytest.mark.parametrize("seed", [0, 1 << 63, (1 << 64) - 1])
def test_the_logprob_of_what_is_drawn_is_finite(
    cut: dict[str, Any], temperature: float, seed: int
) -> None:
    """Whatever the parameters, tokens that are ruled out, ties and a ban on the likeliest one."""
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(4)) * 5
    logits[0, 1:] = -math.inf
    logits[1] = 0.0
    logits[2, :3] = 100.0
    logits[3, ::2] = -math.inf
    params = SamplingParams(max_tokens=9, temperature=temperature, seed=seed, min_tokens=9, **cut)
    banned = [(), (), (0, 1), (1,), tuple(range(VOCAB - 1))]
    rows = [Row.of(params, i, tokens) for i, tokens in enumerate(banned)]
    tokens, logprobs, *_ = sample(logits, SamplingBatch(rows, [0] * 5))
    assert logprobs.isfinite().all()
    assert (logprobs <= 0).all()
    assert tokens[0] == 0
    assert tokens[4] == VOCAB - 1
    assert all(int(token) not in ban for token, ban in zip(tokens, banned, strict=True))


def test_a_row_does_not_depend_on_its_company() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(9, 1000, generator=generator).bfloat16()  # many ties
    params = [
        SamplingParams(max_tokens=1, seed=1),
        SamplingParams(max_tokens=1, temperature=0),
        SamplingParams(max_tokens=1, top_k=3, seed=2),
        SamplingParams(max_tokens=1, top_p=0.9, seed=3),
        SamplingParams(max_tokens=1, min_p=0.05, seed=4),
        SamplingParams(max_tokens=1, top_k=50, top_p=0.9, seed=5),
        SamplingParams(max_tokens=1, top_k=500, min_p=0.01, seed=6),
        SamplingParams(max_tokens=1, temperature=0.01, seed=-7),
        SamplingParams(max_tokens=1, temperature=1e-30, seed=2**80),
    ]
    rows = [Row.of(p, i, ()) for i, p in enumerate(params)]
    indices = list(range(30, 39))
    together, logprobs, *_ = sample(logits, SamplingBatch(rows, indices))
    for i, row in enumerate(rows):
        token, logprob, *_ = sample(logits[i : i + 1], SamplingBatch([row], indices[i : i + 1]))
        assert token.item() == together[i].item()
        assert logprob.item() == logprobs[i].item()
    assert together[8] == logits[8].float().argmax()  # next to zero is greedy, not NaN


def test_seed_sample_and_index_all_count() -> None:
    logits = torch.zeros(1, 100_000)

    def token(seed: int, sample_: int, index: int) -> int:
        row = Row.of(SamplingParams(max_tokens=1, seed=seed), sample_, ())
        return int(sample(logits, SamplingBatch([row], [index]))[0])

    spots = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (0, 1, 1)]
    assert len({token(*spot) for spot in spots}) == len(spots)
    assert token(7, 3, 11) == token(7, 3, 11)


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


def test_extreme_parameters_do_not_overflow() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature, top_k in ((5e-324, 0), (1e-9, 1 << 70)):
        row = Row.of(SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k), 0, ())
        token, logprob, *_ = sample(logits, SamplingBatch([row], [0]))
        assert (token.item(), logprob.item()) == (1, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5}], ids=str)
def test_bad_logits_spoil_their_own_row_only(bad: float, params: dict[str, Any]) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(8))
    rows = [Row.of(SamplingParams(max_tokens=1, **params), 0, ())] * 3
    batch = SamplingBatch(rows, [0, 1, 2])
    clean_tokens, clean_logprobs, *_ = sample(logits, batch)
    logits[1, 4] = bad
    tokens, logprobs, *_ = sample(logits, batch)
    assert math.isnan(logprobs[1])
    for i in (0, 2):
        assert (tokens[i], logprobs[i]) == (clean_tokens[i], clean_logprobs[i])


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
    counts = Counter(drawn.token_ids.tolist())
    for token, prob in enumerate(_expected(changed, params)):
        spread = math.sqrt(count * prob * (1 - prob))
        assert abs(counts[token] - count * prob) <= 4.5 * spread + 1e-6, (token, prob)
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


@pytest.mark.parametrize("find", [top_tokens, top_tokens_by_keys])
def test_top_tokens_are_the_likeliest_with_ties_by_id(
    find: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> None:
    generator = torch.Generator().manual_seed(14)
    # Few different values: most ties are at the border.
    logprobs = torch.randint(-6, 0, (20, 300), generator=generator).float()
    logprobs[3] = -1.0
    logprobs[4, :2] = torch.tensor([-0.0, 0.0])
    logprobs[5] = torch.randn(300, generator=generator)  # of either sign
    logprobs[6, ::3] = -torch.inf
    for count in (1, 5, 20, 300):
        ids, values = find(logprobs, count)
        for row, row_ids, row_values in zip(logprobs.tolist(), ids.tolist(), values, strict=True):
            expected = sorted(range(300), key=lambda token: (-row[token], token))[:count]
            assert row_ids == expected
            assert row_values.tolist() == [row[token] for token in expected]


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
