"""Philox against its published vectors; cuts and draws against a direct computation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_svc.core.engine import SamplingParams
from executor_svc.torch_engine.draws import philox, top_tokens, top_tokens_by_keys, uniforms
from executor_svc.torch_engine.sampler import Row, SamplingBatch, sample
from tests.engine.distributions import VOCAB, assert_drawn_from, expected

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
    assert_drawn_from(expected(logits, params), _draws(logits, params).tolist())


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
