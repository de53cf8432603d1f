"""What a model thinks of a prompt: logprobs, likeliest tokens, targets, alternatives.

Rule: row r of a forward pass, which is the token at position r, tells of position r + 1; so a
prompt of n tokens has n - 1 rows to score, and its first token has no scores. Logprobs are at
temperature 1 and before any cut, alternatives are drawn with the request's temperature and cuts.

A prompt comes in chunks, and a chunk's rows are taken a few at a time, because logits of all rows
at once would take 20 GB for 32,000 tokens and a vocabulary of 150,000. What is found is kept by
position, so it does not matter how the prompt was cut, nor whether a chunk is run again.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from executor_svc.core.engine import PromptScores, PromptScoring, SamplingParams
from executor_svc.torch_engine.draws import (
    ALTERNATIVES,
    Cuts,
    cumulative_mass,
    pick,
    scaled,
    seed_words,
    temperatures,
    top_tokens,
    uniforms,
)

_DEFAULT_LOGITS_ELEMENTS = 1 << 24  # 64 MiB in float32


class PromptScorer:
    """The scores of one prompt, while its rows come in.

    ``max_rows`` of logits are looked at together; None takes as many as 64 MiB hold.
    """

    def __init__(
        self,
        scoring: PromptScoring,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        vocab_size: int,
        max_rows: int | None,
    ) -> None:
        self._scoring, self._params = scoring, params
        self._prompt = np.asarray(prompt_token_ids, dtype=np.int64)
        self._targets = np.asarray(scoring.target_token_ids, dtype=np.int64)
        self._max_rows = max_rows or max(1, _DEFAULT_LOGITS_ELEMENTS // vocab_size)
        num_rows = len(self._prompt) - 1
        self._offsets = np.zeros(num_rows + 1, dtype=np.int64)
        if len(scoring.target_offsets):
            self._offsets[:] = scoring.target_offsets
        # Rows whose position is among the last last_n tokens.
        self._first_listed = max(0, num_rows - scoring.last_n) if scoring.last_n else 0
        self._rows = self._needed_rows(num_rows)
        self._num_done = 0
        num_listed = num_rows - self._first_listed
        self._logprob = np.full(num_rows + 1, np.nan, dtype=np.float32)
        self._top_ids = np.zeros((num_listed, scoring.top_logprobs), dtype=np.int64)
        self._top_logprobs = np.zeros((num_listed, scoring.top_logprobs), dtype=np.float32)
        self._target_logprob = np.zeros(len(self._targets), dtype=np.float32)
        self._drawn_ids = np.zeros((num_rows, scoring.num_alternatives), dtype=np.int64)
        self._drawn_logprobs = np.zeros((num_rows, scoring.num_alternatives), dtype=np.float32)

    @property
    def next_row(self) -> int:
        """The first row that is still to be seen; those before it need not be computed."""
        if self.is_complete:
            return len(self._prompt) - 1
        return int(self._rows[self._num_done])

    @property
    def is_complete(self) -> bool:
        return self._num_done == len(self._rows)

    def take(self, start: int, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        """Score what a chunk's rows tell: ``hidden`` [rows, hidden] begins with row ``start``.

        ``logits`` makes [rows, vocab] of some of them. No row that is needed may be left out.
        """
        while not self.is_complete and self.next_row < start + hidden.shape[0]:
            assert self.next_row >= start
            rows = self._rows[self._num_done : self._num_done + self._max_rows]
            rows = rows[rows < start + hidden.shape[0]]
            index = torch.from_numpy(rows - start).to(hidden.device)
            self._score(rows, logits(hidden[index]).float())
            self._num_done += len(rows)

    def result(self, key: int) -> PromptScores:
        """The scores, once all rows were taken."""
        assert self.is_complete
        return PromptScores(
            key=key,
            logprob=self._logprob.tolist() if self._scoring.wants_logprobs else [],
            top_token_id=self._top_ids.ravel().tolist(),
            top_logprob=self._top_logprobs.ravel().tolist(),
            target_logprob=self._target_logprob.tolist(),
            alternative_token_id=self._drawn_ids.ravel().tolist(),
            alternative_logprob=self._drawn_logprobs.ravel().tolist(),
        )

    @property
    def is_finite(self) -> bool:
        """Whether the scores that are there can be reported."""
        listed = self._logprob[self._first_listed + 1 :] if self._scoring.wants_logprobs else 0.0
        return all(
            np.isfinite(scores).all()
            for scores in (listed, self._top_logprobs, self._target_logprob, self._drawn_logprobs)
        )

    def _needed_rows(self, num_rows: int) -> np.ndarray:
        is_needed = np.diff(self._offsets) > 0
        if self._scoring.wants_logprobs or self._scoring.top_logprobs:
            is_needed[self._first_listed :] = True
        if self._scoring.num_alternatives:
            is_needed[:] = True
        return np.flatnonzero(is_needed)

    def _score(self, rows: np.ndarray, logits: Tensor) -> None:  # [rows], [rows, vocab]
        logprobs = torch.log_softmax(logits, dim=-1)
        if rows[-1] >= self._first_listed:
            listed = np.flatnonzero(rows >= self._first_listed)
            self._list(rows[listed], logprobs[torch.from_numpy(listed).to(logits.device)])
        first, last = self._offsets[rows[0]], self._offsets[rows[-1] + 1]
        if first < last:
            # Rows in between that are not needed have no targets.
            counts = self._offsets[rows + 1] - self._offsets[rows]
            chosen = logprobs[
                torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(logits.device),
                torch.from_numpy(self._targets[first:last]).to(logits.device),
            ]
            self._target_logprob[first:last] = chosen.cpu().numpy()
        if self._scoring.num_alternatives:
            self._draw(rows, logits)

    def _list(self, rows: np.ndarray, logprobs: Tensor) -> None:  # [rows], [rows, vocab]
        """The logprobs of the prompt's own tokens, and of the likeliest ones."""
        if self._scoring.wants_logprobs:
            own = torch.from_numpy(self._prompt[rows + 1])[:, None].to(logprobs.device)
            self._logprob[rows + 1] = logprobs.gather(1, own)[:, 0].cpu().numpy()
        if self._scoring.top_logprobs:
            ids, values = top_tokens(logprobs, self._scoring.top_logprobs)
            self._top_ids[rows - self._first_listed] = ids.cpu().numpy()
            self._top_logprobs[rows - self._first_listed] = values.cpu().numpy()

    def _draw(self, rows: np.ndarray, logits: Tensor) -> None:  # [rows], [rows, vocab]
        """Alternatives: independent draws for each position, in a random stream of their own."""
        params, count, device = self._params, self._scoring.num_alternatives, logits.device
        temperature = torch.from_numpy(temperatures([params.temperature])).to(device)
        logprobs = torch.log_softmax(scaled(logits, temperature), dim=-1)
        if params.temperature > 0:
            probs = (logprobs - logprobs.amax(-1, keepdim=True)).exp_()
            probs = Cuts([(params.top_k, params.top_p, params.min_p)] * len(rows)).apply(probs)
            ids = pick(probs, cumulative_mass(probs), self._uniforms(rows, count).to(device))
        else:
            ids = logprobs.argmax(-1, keepdim=True).expand(-1, count)
        self._drawn_ids[rows] = ids.cpu().numpy()
        self._drawn_logprobs[rows] = logprobs.gather(1, ids).cpu().numpy()

    def _uniforms(self, rows: np.ndarray, count: int) -> Tensor:
        """Numbers in [0, 1), float64 [rows, count]."""
        positions = torch.from_numpy(rows + 1).repeat_interleave(count)
        numbers = torch.arange(count).repeat(len(rows))
        stream = torch.full_like(numbers, ALTERNATIVES)
        counter = torch.stack([positions, numbers, stream, torch.zeros_like(numbers)], dim=1)
        key = torch.tensor([seed_words(self._params.seed)]).expand(len(numbers), 2)
        return uniforms(counter, key).view(len(rows), count)
