"""Logits to tokens, a whole step at once.

Rule: a draw is a pure function of the row's logits, its parameters, its sequence's tokens and
(seed, sample, index), so a preempted, resumed or moved sequence goes on unchanged.

Order: penalties and bias (adjustments.py); the grammar and min_tokens, which rule tokens out;
temperature; cuts and draw (draws.py). Reported logprobs are those of the model under the
temperature-scaled distribution, before all the rest; greedy rows report them at temperature 1.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from executor_svc.core.engine import SamplingParams
from executor_svc.torch_engine.adjustments import Adjustments, adjust
from executor_svc.torch_engine.draws import (
    SAMPLES,
    Cuts,
    cumulative_mass,
    pick,
    scaled,
    seed_words,
    temperatures,
    top_tokens,
    uniforms,
)
from executor_svc.torch_engine.grammar import GrammarError, GrammarMatcher
from executor_svc.torch_engine.scoring import PromptScorer

_LEAST_SCORE = -1e38  # float32's least number is a little below


@dataclass(slots=True, eq=False)
class Row:
    """One sequence as a step sees it: what it asked for, and what it keeps from step to step.

    None stands for what was not asked for; such a row costs nothing more for it.
    """

    temperature: float
    cuts: tuple[int, float, float]  # top_k, top_p, min_p
    key: tuple[int, int]  # of its random numbers
    sample: int
    min_tokens: int
    banned_until_then: tuple[int, ...]  # stop tokens
    num_top: int
    adjustments: Adjustments | None
    matcher: GrammarMatcher | None = None
    scorer: PromptScorer | None = None  # of the lease's prompt, with the first of its sequences

    @staticmethod
    def of(
        params: SamplingParams,
        sample: int,
        stop_token_ids: Collection[int],
        *,
        matcher: GrammarMatcher | None = None,
        scorer: PromptScorer | None = None,
    ) -> "Row":
        return Row(
            temperature=params.temperature,
            cuts=(params.top_k, params.top_p, params.min_p),
            key=seed_words(params.seed),
            sample=sample,
            min_tokens=params.min_tokens,
            banned_until_then=tuple(sorted(stop_token_ids)) if params.min_tokens else (),
            num_top=params.top_logprobs,
            adjustments=Adjustments.of(params),
            matcher=matcher,
            scorer=scorer,
        )


class SamplingBatch:
    """The rows of a step, packed. ``indices[i]`` is the number of row i's token.

    ``texts[i]`` are the tokens of its sequence, and how many of them are the prompt; only rows
    with adjustments or a grammar need them. ``copy`` brings arrays to the device. ``problems``
    says by row why it cannot be drawn: its grammar allows nothing. It gets a token like the others,
    which means nothing.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        indices: Sequence[int],
        texts: Sequence[tuple[Sequence[int], int]] = (),
        copy: Callable[[np.ndarray], Tensor] = torch.from_numpy,
    ) -> None:
        self.temperature = copy(temperatures([row.temperature for row in rows]))
        drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
        self.cuts = Cuts([rows[i].cuts for i in drawn])
        numbers = [(i, *rows[i].key, indices[i], rows[i].sample, SAMPLES, 0) for i in drawn]
        packed = copy(np.array(numbers, dtype=np.int64).reshape(-1, 7))
        self.drawn, self.key, self.counter = packed[:, 0], packed[:, 1:3], packed[:, 3:]
        self.tops = [(i, row.num_top) for i, row in enumerate(rows) if row.num_top]
        self.adjustments: dict[int, Adjustments] = {}  # by number in ``restricted``, as all below
        self.restricted: list[int] = []  # rows that have any of them
        self.problems: dict[int, str] = {}
        masked, masks, banned = [], [], []
        for i, (row, index) in enumerate(zip(rows, indices, strict=True)):
            may_end = index >= row.min_tokens
            if row.adjustments is None and row.matcher is None and may_end:
                continue
            number = len(self.restricted)
            self.restricted.append(i)
            if row.adjustments is not None:
                row.adjustments.catch_up(*texts[i])
                self.adjustments[number] = row.adjustments
            if row.matcher is not None:
                try:
                    masks.append(row.matcher.allowed(*texts[i], may_end=may_end))
                    masked.append(number)
                except GrammarError as error:
                    self.problems[i] = str(error)
            elif not may_end:
                banned += [(number, token_id) for token_id in row.banned_until_then]
        self.masked = copy(np.array(masked, dtype=np.int64)) if masks else None
        self.masks = copy(np.stack(masks).view(np.int32)) if masks else None  # [masked, words]
        self.banned = copy(np.array(banned, dtype=np.int64)) if banned else None  # [entries, 2]


class Sampled(NamedTuple):
    """Token ids [rows] and their logprobs [rows], NaN for a row with bad logits.

    The likeliest tokens are there if any row asked, [asking rows, most that any asked for].
    """

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:  # [rows, vocab]
    """Draw a token for each row."""
    logits = logits.float()
    probs = scaled(logits, batch.temperature).exp_()
    mass = cumulative_mass(probs)
    log_total = mass[:, -1:].log()
    is_any_greedy = len(batch.drawn) < len(logits)
    token_ids = logits.argmax(-1) if is_any_greedy else batch.drawn.clone()
    if batch.restricted:
        rows = torch.tensor(batch.restricted).to(logits.device)
        scores = _restricted(logits[rows], batch.temperature[rows], batch)
        token_ids[rows] = scores.argmax(-1)
        # From the maximum down, so that a ban leaves some mass even if it takes nearly all.
        probs[rows] = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        mass = cumulative_mass(probs)
    if len(batch.drawn):
        token_ids[batch.drawn] = _draw(probs, mass, batch)
    logprobs = _logprobs(logits, token_ids[:, None], log_total, batch.temperature)[:, 0]
    if not batch.tops:
        return Sampled(token_ids, logprobs)
    rows = torch.tensor([i for i, _ in batch.tops]).to(logits.device)
    most = min(max(count for _, count in batch.tops), logits.shape[1])
    logits = logits[rows]
    top_ids, _ = top_tokens(logits, most)
    top_logprobs = _logprobs(logits, top_ids, log_total[rows], batch.temperature[rows])
    return Sampled(token_ids, logprobs, top_ids, top_logprobs)


def _draw(probs: Tensor, mass: Tensor, batch: SamplingBatch) -> Tensor:
    """Token ids of the rows that are not greedy."""
    if len(batch.drawn) < len(probs):
        probs, mass = probs[batch.drawn], mass[batch.drawn]
    cut = batch.cuts.apply(probs)
    if cut is not probs:
        mass = cumulative_mass(cut)
    return pick(cut, mass, uniforms(batch.counter, batch.key)[:, None])[:, 0]


def _logprobs(logits: Tensor, token_ids: Tensor, log_total: Tensor, temperature: Tensor) -> Tensor:
    """Of some tokens of each row, [rows, tokens]; ``log_total`` and ``temperature`` [rows, 1]."""
    chosen = (logits.gather(1, token_ids) - logits.amax(-1, keepdim=True)) / temperature
    return (chosen - log_total).float()


def _restricted(logits: Tensor, temperature: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits at their temperature, with adjustments, and -inf for what may not come.

    [restricted rows, vocab]; ``logits`` is a copy and not kept.
    """
    adjust(logits, batch.adjustments)
    # Finite, so that what is ruled out below is less likely than anything else.
    scores = scaled(logits, temperature).clamp_(min=_LEAST_SCORE)
    if batch.masked is not None and batch.masks is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        is_allowed = (batch.masks[:, :, None] >> bits & 1).flatten(1)[:, : scores.shape[1]]
        scores[batch.masked] = scores[batch.masked].masked_fill(is_allowed == 0, -torch.inf)
    if batch.banned is not None:
        scores[batch.banned[:, 0], batch.banned[:, 1]] = -torch.inf
    return scores
