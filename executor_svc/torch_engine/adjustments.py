"""Penalties and bias: what a request changes in the model's logits before a token is drawn.

Order: repetition penalty, frequency and presence penalty, bias. Frequency and presence count
output tokens only, as OpenAI and vLLM do; repetition counts the prompt's too (Keskar et al.,
"CTRL", 2019).

What a sequence has seen is a function of its tokens alone. The counts are kept from step to step
because counting anew would cost a pass over the whole text for each token; ``catch_up`` takes in
whatever tokens are new, be they one or, after a move to another executor, all.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from executor_svc.core.engine import SamplingParams

_NO_PENALTIES = (1.0, 0.0, 0.0)
_LARGEST = 1e30  # of a logit; a repetition penalty next to 0 would make it infinite


class Adjustments:
    """The adjustments of one sequence, as entries: one for each token that has been seen."""

    def __init__(self, params: SamplingParams) -> None:
        self.bias = params.logit_bias
        self.penalties = _penalties(params)  # repetition, frequency, presence
        self._counts_prompt = params.repetition_penalty != 1.0
        self._counts_output = self.penalties != _NO_PENALTIES
        self._num_taken = 0
        self._entry_of: dict[int, int] = {}
        self._token_ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)  # in the output

    @staticmethod
    def of(params: SamplingParams) -> "Adjustments | None":
        """None where the model's logits stay as they are."""
        is_neutral = _penalties(params) == _NO_PENALTIES and not params.logit_bias
        return None if is_neutral else Adjustments(params)

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and how often each is in the output; all that penalties move."""
        size = len(self._entry_of)
        return self._token_ids[:size], self._counts[:size]

    def catch_up(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Take in the tokens that were appended since the last call."""
        if self._counts_prompt:
            for token_id in token_ids[self._num_taken : num_prompt_tokens]:
                self._entry(token_id)
        if self._counts_output:
            for token_id in token_ids[max(self._num_taken, num_prompt_tokens) :]:
                entry = self._entry(token_id)  # which may move the counts
                self._counts[entry] += 1
        self._num_taken = len(token_ids)

    def _entry(self, token_id: int) -> int:
        entry = self._entry_of.setdefault(token_id, len(self._entry_of))
        if entry == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._token_ids[entry] = token_id
        return entry


def adjust(
    logits: Tensor, rows: dict[int, Adjustments], copy: Callable[[np.ndarray], Tensor]
) -> None:
    """Change some rows of logits, float32 [rows, vocab], in place, all of them at once.

    ``copy`` brings arrays to where the logits are.
    """
    seen = [row.seen for row in rows.values()]
    num_seen = [len(token_ids) for token_ids, _ in seen]
    if any(num_seen):
        token_ids = np.concatenate([token_ids for token_ids, _ in seen])
        at = copy(np.repeat(list(rows), num_seen)), copy(token_ids)
        counts = copy(np.concatenate([counts for _, counts in seen]))
        penalties = np.repeat([row.penalties for row in rows.values()], num_seen, axis=0)
        repetition, frequency, presence = copy(penalties).float().unbind(1)
        old = logits[at]
        new = torch.where(old > 0, old / repetition, old * repetition)
        new = new.clamp(-_LARGEST, _LARGEST) - frequency * counts
        logits[at] = new - presence.where(counts > 0, 0.0)
    biased = [(i, *pair) for i, row in rows.items() for pair in row.bias]
    if biased:
        row_ids, token_ids, bias = (np.array(column) for column in zip(*biased, strict=True))
        at = copy(row_ids), copy(token_ids)
        logits[at] += copy(bias).float()


def _penalties(params: SamplingParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.frequency_penalty, params.presence_penalty
