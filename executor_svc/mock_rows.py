"""The running sequences of a mock engine, as columns.

All of them advance together, and it is known when one joins in which round it ends: so a token
costs a few list operations and no call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from executor_svc.core.engine import SequenceEnd, StepOutput
from executor_svc.mock_formulas import PRIME, STRIDE, mock_top


@dataclass(slots=True, eq=False)
class MockSequence:
    """One token stream: where it stands, and its end, which is known beforehand."""

    lease_key: int
    key: int
    base: int
    index: int  # of its next token when it joins; the column has it from then on
    end: SequenceEnd
    num_prefill_tokens: int
    num_top: int
    place: int = -1  # in the columns; -1 while it waits
    last_round: int = -1


class MockRows:
    """Entry i of each column belongs to the sequence in row i."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._eos = vocab_size - 1
        self._rows: list[MockSequence] = []
        self._keys: list[int] = []
        self._bases: list[int] = []
        self._indexes: list[int] = []
        self._num_tops: list[int] = []
        self._num_rounds = 0
        self._ending: dict[int, list[MockSequence]] = {}  # by last_round

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, sequence: MockSequence) -> None:
        """Take the next row."""
        sequence.place = len(self._rows)
        self._rows.append(sequence)
        self._keys.append(sequence.key)
        self._bases.append(sequence.base)
        self._indexes.append(sequence.index)
        self._num_tops.append(sequence.num_top)
        sequence.last_round = self._num_rounds + sequence.end.num_tokens - sequence.index - 1
        self._ending.setdefault(sequence.last_round, []).append(sequence)

    def abort(self, sequence: MockSequence) -> None:
        """Give up a row before its end."""
        self._ending[sequence.last_round].remove(sequence)
        self._leave(sequence)

    def _leave(self, sequence: MockSequence) -> None:
        """The last row moves there."""
        last, key = self._rows.pop(), self._keys.pop()
        base, index, num_top = self._bases.pop(), self._indexes.pop(), self._num_tops.pop()
        if last is not sequence:
            place = last.place = sequence.place
            self._rows[place], self._keys[place] = last, key
            self._bases[place], self._indexes[place] = base, index
            self._num_tops[place] = num_top

    def run_round(self, output: StepOutput) -> Sequence[MockSequence]:
        """One token for each row; gives those that have ended by it and left."""
        num_ids = self._eos
        token_ids = [
            (base ^ index * STRIDE) % PRIME % num_ids
            for base, index in zip(self._bases, self._indexes, strict=True)
        ]
        ended = self._ending.pop(self._num_rounds, ())
        for sequence in ended:
            if sequence.end.stop_token_id == self._eos:
                token_ids[sequence.place] = self._eos
        if any(self._num_tops):
            self._add_alternatives(output, token_ids)
        output.key += self._keys
        output.index += self._indexes
        output.token_id += token_ids
        output.logprob += [-(token_id % 1024) / 1024 for token_id in token_ids]
        self._indexes = [index + 1 for index in self._indexes]
        self._num_rounds += 1
        for sequence in ended:
            output.ends.append(sequence.end)
            self._leave(sequence)
        return ended

    def _add_alternatives(self, output: StepOutput, token_ids: list[int]) -> None:
        """Of tokens that are yet to be added."""
        output.num_top += [0] * (len(output.key) - len(output.num_top))
        output.num_top += self._num_tops
        for token_id, num_top in zip(token_ids, self._num_tops, strict=True):
            if num_top:
                top_token_ids, top_logprobs = mock_top(token_id, num_top, self._vocab_size)
                output.top_token_id += top_token_ids
                output.top_logprob += top_logprobs
