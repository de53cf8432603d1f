"""Scores of prompts against transformers' full forward pass, however the prompt is cut."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from executor_svc.core.engine import (
    LeaseRequest,
    PromptScores,
    PromptScoring,
    SamplingParams,
)
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.scoring import PromptScorer
from headway.reasons import Reason
from tests.engine.checkpoints import reference_model
from tests.engine.distributions import assert_drawn_from, expected
from tests.engine.driving import build, lease, only, run

PROMPT = [(7 * i + i // 5) % 300 + 3 for i in range(90)]
PARAMS = SamplingParams(max_tokens=3, temperature=0.7, top_k=20, seed=5, ignore_eos=True)
# Position i + 1 has i % 4 targets.
OFFSETS = [sum(j % 4 for j in range(i)) for i in range(len(PROMPT))]
TARGETS = [(11 * i) % 320 for i in range(OFFSETS[-1])]
EVERYTHING = PromptScoring(
    wants_logprobs=True,
    top_logprobs=5,
    target_offsets=OFFSETS,
    target_token_ids=TARGETS,
    num_alternatives=4,
)


@pytest.fixture(scope="module")
def logits(qwen3: Path) -> torch.Tensor:
    """transformers' logits, [prompt, vocab]."""
    with torch.inference_mode():
        return reference_model(qwen3)(torch.tensor([PROMPT])).logits[0]


def _scores(folder: Path, scoring: PromptScoring, **settings: int | None) -> PromptScores:
    record = run(build(folder, **settings), lease(0, PROMPT, PARAMS, scoring=scoring))
    assert len(record.tokens[0]) == 3
    return record.scores[0]


def _are_close(found: Sequence[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


def test_everything_equals_the_reference(qwen3: Path, logits: torch.Tensor) -> None:
    scores = _scores(qwen3, EVERYTHING)
    logprobs = torch.log_softmax(logits, -1)
    assert math.isnan(scores.logprob[0])
    _are_close(scores.logprob[1:], logprobs[:-1].gather(1, torch.tensor(PROMPT)[1:, None])[:, 0])

    top = logprobs[:-1].topk(5)
    _are_close(scores.top_logprob, top.values.ravel())
    assert scores.top_token_id == top.indices.ravel().tolist()

    rows = [i for i in range(len(PROMPT) - 1) for _ in range(OFFSETS[i], OFFSETS[i + 1])]
    _are_close(scores.target_logprob, logprobs[rows, TARGETS])

    drawn = torch.tensor(scores.alternative_token_id).view(-1, 4)
    scaled = torch.log_softmax(logits[:-1] / PARAMS.temperature, -1)
    _are_close(scores.alternative_logprob, scaled.gather(1, drawn).ravel())
    likely = logits[:-1].topk(PARAMS.top_k).indices
    assert (drawn[:, :, None] == likely[:, None]).any(-1).all()
    assert len(set(scores.alternative_token_id)) > 30


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 7},
        {"max_num_seqs": 1, "max_num_batched_tokens": 89},
        {"max_logits_rows": 1},
        {"max_logits_rows": 13, "max_num_seqs": 1, "max_num_batched_tokens": 40},
    ],
    ids=str,
)
def test_chunks_do_not_matter(qwen3: Path, settings: dict[str, int]) -> None:
    assert str(_scores(qwen3, EVERYTHING, **settings)) == str(_scores(qwen3, EVERYTHING))


@pytest.mark.parametrize(
    "scoring",
    [
        PromptScoring(),
        PromptScoring(wants_logprobs=True),
        PromptScoring(wants_logprobs=True, last_n=1),
        PromptScoring(wants_logprobs=True, last_n=30, top_logprobs=2),
        PromptScoring(wants_logprobs=True, last_n=1000),
        PromptScoring(top_logprobs=3, last_n=7),
        PromptScoring(target_offsets=OFFSETS, target_token_ids=TARGETS),
        PromptScoring(target_offsets=[0] * 90),
        PromptScoring(num_alternatives=4),
        replace(EVERYTHING, last_n=10),
    ],
    ids=range(10),
)
def test_each_part_is_the_same_alone(qwen3: Path, scoring: PromptScoring) -> None:
    """And of the last n tokens, only these."""
    whole, part = _scores(qwen3, EVERYTHING), _scores(qwen3, scoring, max_logits_rows=10)
    num_rows = min(scoring.last_n or 1000, len(PROMPT) - 1)
    if scoring.wants_logprobs:
        expected = [math.nan] * (len(PROMPT) - num_rows) + list(whole.logprob[-num_rows:])
        assert str(part.logprob) == str(expected)
    else:
        assert part.logprob == []
    width = scoring.top_logprobs
    for found, every in (
        (part.top_token_id, whole.top_token_id),
        (part.top_logprob, whole.top_logprob),
    ):
        rows = [every[i : i + width] for i in range(0, len(every), 5)][-num_rows:]
        assert found == [value for row in rows for value in row]
    has_targets = bool(scoring.target_token_ids)
    assert part.target_logprob == (whole.target_logprob if has_targets else [])
    has_alternatives = bool(scoring.num_alternatives)
    assert part.alternative_token_id == (whole.alternative_token_id if has_alternatives else [])
    assert part.alternative_logprob == (whole.alternative_logprob if has_alternatives else [])


def test_alternatives_follow_the_request_and_are_independent() -> None:
    """Many draws at few positions: shares as the cuts have them, no two rows alike."""
    vocab, count = 12, 4_000
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(3))
    logits[2] = logits[0]  # equal rows, other draws

    def draw(params: SamplingParams) -> list[list[int]]:
        scorer = PromptScorer(
            PromptScoring(num_alternatives=count),
            [1, 2, 3, 4],
            params,
            vocab_size=vocab,
            max_rows=2,
        )
        scorer.take(0, logits, lambda rows: rows)
        ids = scorer.result(0).alternative_token_id
        return [list(ids[i : i + count]) for i in range(0, 3 * count, count)]

    params = SamplingParams(max_tokens=1, temperature=1.5, top_p=0.8, seed=9)
    drawn = draw(params)
    assert drawn == draw(params)
    assert drawn[0] != drawn[2]
    assert drawn != draw(replace(params, seed=10))
    assert_drawn_from(expected(logits[0], params), drawn[0])

    greedy = draw(replace(params, temperature=0.0))
    assert [set(row) for row in greedy] == [{int(row.argmax())} for row in logits]


@pytest.mark.parametrize(
    ("vocab", "max_rows", "expected"), [(150_000, None, 111), (150_000, 7, 7), (1 << 25, None, 1)]
)
def test_logits_of_few_rows_are_there_at_once(
    vocab: int, max_rows: int | None, expected: int
) -> None:
    """64 MiB of them, if nothing else is said; a vocabulary is never cut."""
    num_tokens = 3 * expected + 1
    scorer = PromptScorer(
        PromptScoring(wants_logprobs=True),
        [0] * num_tokens,
        PARAMS,
        vocab_size=vocab,
        max_rows=max_rows,
    )
    sizes = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return torch.zeros(len(hidden), 4)  # the first tokens of the vocabulary

    scorer.take(0, torch.zeros(num_tokens, 1), logits)
    assert scorer.is_complete
    assert sizes == [expected] * 3
    assert expected == 1 or expected * vocab * 4 <= 64 << 20


def test_samples_share_one_scoring(qwen3: Path) -> None:
    """Scores come once for a lease, the tokens are those of a lease without scoring."""
    plain = run(build(qwen3), lease(0, PROMPT, PARAMS, num_samples=3))
    record = run(build(qwen3), lease(0, PROMPT, PARAMS, num_samples=3, scoring=EVERYTHING))
    assert record.tokens == plain.tokens
    assert str(record.scores[0]) == str(_scores(qwen3, EVERYTHING))
    assert record.scores.keys() == {0}


def test_the_first_sample_that_lives_scores(qwen3: Path) -> None:
    """As where an earlier attempt ended sample 0 and its scores were lost."""
    held = ([5, 6, 7], (), ())
    request = lease(0, PROMPT, PARAMS, num_samples=3, generated=held, ended=frozenset({0}))
    record = run(build(qwen3), replace(request, scoring=EVERYTHING))
    assert str(record.scores[0]) == str(_scores(qwen3, EVERYTHING))
    assert record.ends.keys() == {1, 2}


def _company(scored: LeaseRequest) -> list[LeaseRequest]:
    """The same prompt without scoring before it, so that all of it is in the cache, and after."""
    return [
        lease(10, PROMPT, PARAMS),
        scored,
        lease(20, PROMPT[:50], replace(PARAMS, max_tokens=30)),
    ]


@pytest.mark.parametrize("scoring", [EVERYTHING, replace(EVERYTHING, last_n=20), PromptScoring()])
def test_a_cached_prompt_is_scored_all_the_same(qwen3: Path, scoring: PromptScoring) -> None:
    engine = build(qwen3)
    first = run(engine, lease(0, PROMPT, PARAMS, scoring=scoring))
    again = run(engine, lease(0, PROMPT, PARAMS, scoring=scoring))
    among = run(engine, *_company(lease(0, PROMPT, PARAMS, scoring=scoring)))
    assert str(first.scores) == str(again.scores) == str(among.scores)
    assert first.tokens[0] == again.tokens[0] == among.tokens[0]


def test_what_is_not_scored_may_come_from_the_cache(qwen3: Path) -> None:
    engine = build(qwen3)
    last = PromptScoring(wants_logprobs=True, last_n=20)
    first = run(engine, lease(0, PROMPT, PARAMS, scoring=last))
    again = run(engine, lease(0, PROMPT, PARAMS, scoring=last))
    assert first.num_cached[0] == 0
    assert again.num_cached[0] == 64  # row 69, which tells of position 70, is in the fifth block
    assert str(again.scores) == str(first.scores)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_preemption_while_a_prompt_is_scored(qwen3: Path, enable_prefix_caching: bool) -> None:
    """Decode rows that grow take the blocks of prompts that came later."""
    growing = [lease(i, [9 + i] * 10, replace(PARAMS, max_tokens=60)) for i in range(3)]
    scored = [lease(10 + i, PROMPT, PARAMS, scoring=EVERYTHING) for i in range(2)]
    engine = build(
        qwen3,
        num_blocks=30,
        block_size=8,
        max_num_seqs=5,
        max_num_batched_tokens=6,
        enable_prefix_caching=enable_prefix_caching,
    )
    record = run(engine, *growing, *scored)
    assert only(engine)._batcher.num_preemptions >= 1
    expected = _scores(qwen3, EVERYTHING)
    for key in (10, 11):
        assert str(record.scores[key]) == str(replace(expected, key=key))


def test_a_prompt_of_one_token_has_no_scores_but_an_answer(qwen3: Path) -> None:
    scoring = PromptScoring(wants_logprobs=True, top_logprobs=2, num_alternatives=2)
    scores = run(build(qwen3), lease(0, [7], PARAMS, scoring=scoring)).scores[0]
    assert str(scores) == str(PromptScores(0, [math.nan], [], [], [], [], []))


def test_scoring_alone_beside_many_others(qwen3: Path) -> None:
    others = [lease(100 + i, PROMPT[i:], PARAMS) for i in range(6)]
    record = run(build(qwen3), *others, lease(0, PROMPT, PARAMS, scoring=EVERYTHING))
    assert str(record.scores[0]) == str(_scores(qwen3, EVERYTHING))
    assert record.scores.keys() == {0}


def test_the_cache_may_skip_what_is_scored_already(qwen3: Path) -> None:
    """As a preempted prompt finds its own blocks again, and maybe more of them than it scored."""
    engine = build(qwen3, max_num_seqs=1, max_num_batched_tokens=10)
    engine.add(lease(0, PROMPT, PARAMS, scoring=EVERYTHING))
    (sequence,) = only(engine)._leases[0]
    seen = [sequence.max_cached_tokens]
    while not engine.step().prompt_scores:
        seen.append(sequence.max_cached_tokens)
    assert seen == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert sequence.max_cached_tokens is None


def test_an_aborted_lease_leaves_nothing(qwen3: Path) -> None:
    engine = build(qwen3, max_num_seqs=1, max_num_batched_tokens=10)
    engine.add(lease(0, PROMPT, PARAMS, scoring=EVERYTHING))
    engine.step()
    engine.abort(0)
    assert str(run(engine, lease(0, PROMPT, PARAMS, scoring=EVERYTHING)).scores[0]) == str(
        _scores(qwen3, EVERYTHING)
    )


def test_scores_that_are_not_finite_end_their_lease_only(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(qwen3)
    model = only(engine)._runner._model
    sound = model.logits

    def sick(hidden: torch.Tensor) -> torch.Tensor:
        logits = sound(hidden)
        if len(logits) > 2:  # the rows of a prompt, not those to draw from
            logits[1, 3] = math.nan
        return logits

    monkeypatch.setattr(model, "logits", sick)
    record = run(engine, lease(0, PROMPT, PARAMS, scoring=EVERYTHING), lease(1, PROMPT, PARAMS))
    assert record.failures.keys() == {0}
    assert record.failures[0].reason is Reason.INTERNAL
    assert "finite" in record.failures[0].detail
    assert record.scores == {}
    assert record.ends[1].num_tokens == 3


def test_a_senseless_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="max_logits_rows"):
        EngineConfig(models=(("m", "x"),), max_logits_rows=0)
