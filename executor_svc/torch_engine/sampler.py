"""Logits to tokens, a whole step at once.

Rule: a draw is a pure function of the row's logits, its parameters, its sequence's tokens and
(seed, sample, index), so a preempted, resumed or moved sequence goes on unchanged.

Order: penalties and bias (adjustments.py); the grammar and min_tokens, which rule tokens out;
temperature; cuts and draw (draws.py; kernels/sampling.py on a GPU). Reported logprobs are those of
the model under the temperature-scaled distribution, before all the rest; greedy rows report them at
temperature 1.
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
from executor_svc.torch_engine.grammar_matcher import GrammarError, GrammarMatcher
from executor_svc.torch_engine.scoring import PromptScorer
from executor_svc.torch_engine.wishes import HostWishes, Wishes

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

    @property
    def needs_text(self) -> bool:
        """Its next token depends on the tokens before it, and not just on their logits."""
        return self.adjustments is not None or self.matcher is not None

    def is_plain(self, index: int) -> bool:
        """Token number ``index`` needs no more than temperature, cuts and a draw."""
        return not (self.needs_text or self.num_top) and index >= self.min_tokens


def host_wishes(rows: Sequence[Row], indices: Sequence[int]) -> HostWishes:
    """What the rows want of their tokens, of which row i's is number ``indices[i]``."""
    return HostWishes.of(
        [row.temperature for row in rows],
        [row.cuts for row in rows],
        [row.key for row in rows],
        [(index, row.sample) for row, index in zip(rows, indices, strict=True)],
    )


class SamplingBatch:
    """The rows of a step, packed. ``indices[i]`` is the number of row i's token.

    ``texts[i]`` are the tokens of its sequence, and how many of them are the prompt; only rows
    with adjustments or a grammar need them. ``copy`` brings arrays to the device; where that is one
    ``with_kernels``, they draw. ``problems`` says by row why it cannot be drawn: its grammar allows
    nothing. It gets a token like the others, which means nothing.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        indices: Sequence[int],
        texts: Sequence[tuple[Sequence[int], int]] = (),
        copy: Callable[[np.ndarray], Tensor] = torch.from_numpy,
        *,
        with_kernels: bool = False,
    ) -> None:
        self.copy = copy
        self.temperature = copy(temperatures([row.temperature for row in rows]))
        drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
        self.cuts = Cuts([rows[i].cuts for i in drawn])
        self.wishes: Wishes | None = None
        if with_kernels:
            self.wishes = Wishes(*map(copy, host_wishes(rows, indices)))
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

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sampled":
        """The same for all tensors that are there."""
        ids, logprobs, *tops = (None if part is None else change(part) for part in self)
        assert ids is not None
        assert logprobs is not None
        return Sampled(ids, logprobs, *tops)


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:  # [rows, vocab]
    """Draw a token for each row."""
    logits = logits.float()
    probs = scaled(logits, batch.temperature).exp_()
    mass = cumulative_mass(probs) if batch.wishes is None else None
    log_total = _totals(probs, mass).log()
    is_any_greedy = len(batch.drawn) < len(logits)
    token_ids = logits.argmax(-1) if is_any_greedy else batch.drawn.clone()
    if batch.restricted:
        rows = batch.copy(np.array(batch.restricted))
        scores = _restricted(logits[rows], batch.temperature[rows], batch)
        token_ids[rows] = scores.argmax(-1)
        # From the maximum down, so that a ban leaves some mass even if it takes nearly all.
        probs[rows] = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        mass = cumulative_mass(probs) if batch.wishes is None else None
    if len(batch.drawn):
        token_ids[batch.drawn] = _draw(probs, mass, batch)
    logprobs = logprobs_of(logits, token_ids[:, None], log_total, batch.temperature)[:, 0]
    if not batch.tops:
        return Sampled(token_ids, logprobs)
    rows = batch.copy(np.array([i for i, _ in batch.tops]))
    most = min(max(count for _, count in batch.tops), logits.shape[1])
    logits = logits[rows]
    top_ids, _ = top_tokens(logits, most)
    top_logprobs = logprobs_of(logits, top_ids, log_total[rows], batch.temperature[rows])
    return Sampled(token_ids, logprobs, top_ids, top_logprobs)


def _totals(probs: Tensor, mass: Tensor | None) -> Tensor:
    """The sum of each row, float64 [rows, 1]."""
    if mass is not None:
        return mass[:, -1:]
    from executor_svc.torch_engine.kernels.sampling import totals

    return totals(probs)


def _draw(probs: Tensor, mass: Tensor | None, batch: SamplingBatch) -> Tensor:
    """Token ids of the rows that are not greedy."""
    if mass is None:
        from executor_svc.torch_engine.kernels.sampling import draw

        assert batch.wishes is not None
        return draw(probs, batch.wishes)[batch.drawn]
    if len(batch.drawn) < len(probs):
        probs, mass = probs[batch.drawn], mass[batch.drawn]
    cut = batch.cuts.apply(probs)
    if cut is not probs:
        mass = cumulative_mass(cut)
    return pick(cut, mass, uniforms(batch.counter, batch.key)[:, None])[:, 0]


def logprobs_of(
    logits: Tensor, token_ids: Tensor, log_total: Tensor, temperature: Tensor
) -> Tensor:
    """Of some tokens of each row, [rows, tokens]; ``log_total`` and ``temperature`` [rows, 1]."""
    chosen = (logits.gather(1, token_ids) - logits.amax(-1, keepdim=True)) / temperature
    return (chosen - log_total).float()


def _restricted(logits: Tensor, temperature: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits at their temperature, with adjustments, and -inf for what may not come.

    [restricted rows, vocab]; ``logits`` is a copy and not kept.
    """
    adjust(logits, batch.adjustments, batch.copy)
    # Finite, so that what is ruled out below is less likely than anything else.
    scores = scaled(logits, temperature).clamp_(min=_LEAST_SCORE)
    if batch.masked is not None and batch.masks is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        is_allowed = (batch.masks[:, :, None] >> bits & 1).flatten(1)[:, : scores.shape[1]]
        scores[batch.masked] = scores[batch.masked].masked_fill(is_allowed == 0, -torch.inf)
    if batch.banned is not None:
        scores[batch.banned[:, 0], batch.banned[:, 1]] = -torch.inf
    return scores
