"""Training windows: rows of token ids, each with the ids to predict.

Rule: plain documentation is one long stream, cut at an offset that differs from epoch to epoch; a
chat is never cut, and only its answers are to be predicted.
"""

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer

from executor_svc.builtin_model import corpus
from executor_svc.builtin_model.chats import Message, make_chats
from executor_svc.builtin_model.tokenizer import END_OF_TEXT, load_template, token_id

IGNORED = -100  # the label that cross_entropy skips

# inputs, labels  # [windows, window_length] each; labels are already shifted by one
Windows = tuple[torch.Tensor, torch.Tensor]


class Documentation:
    """Plain documentation as one token stream, cut into windows."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, length: int) -> None:
        self._documents = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        self._end = token_id(tokenizer, END_OF_TEXT)
        self._length = length

    def windows(self, random_source: random.Random) -> Windows:
        documents = random_source.sample(self._documents, len(self._documents))
        stream = [token for document in documents for token in (*document, self._end)]
        stream = stream[random_source.randrange(self._length) :]
        num_windows = (len(stream) - 1) // self._length
        tokens = torch.tensor(stream[: num_windows * self._length + 1])
        return (
            tokens[:-1].view(num_windows, self._length),
            tokens[1:].view(num_windows, self._length),
        )


class Chats:
    """Chats rendered by the model's own template; a window holds whole chats only."""

    def __init__(self, entries: list[corpus.Entry], tokenizer: Tokenizer, length: int) -> None:
        self._entries = entries
        self._tokenizer = tokenizer
        self._render = load_template()
        self._pad = token_id(tokenizer, END_OF_TEXT)
        self._length = length

    def windows(self, random_source: random.Random) -> Windows:
        conversations = make_chats(self._entries, random_source)
        inputs: list[list[int]] = []
        labels: list[list[int]] = []
        for tokens, targets in self._tokenised(conversations):
            if len(tokens) > self._length:
                continue
            if not inputs or len(inputs[-1]) + len(tokens) > self._length:
                inputs.append([])
                labels.append([])
            inputs[-1] += tokens
            labels[-1] += targets
        for row, targets in zip(inputs, labels, strict=True):
            row += [self._pad] * (self._length - len(row))
            targets += [IGNORED] * (self._length - len(targets))
        return torch.tensor(inputs), torch.tensor(labels)

    def _tokenised(
        self, conversations: list[list[Message]]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids, and for each position the id to predict there where an answer is due."""
        pieces: list[str] = []
        is_answer: list[bool] = []
        num_pieces: list[int] = []
        for messages in conversations:
            num_before = len(pieces)
            done = ""
            for index, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                asked = self._render(messages=messages[:index], add_generation_prompt=True)
                answered = self._render(messages=messages[: index + 1])
                after_answer = answered.removesuffix("\n")
                pieces += [asked[len(done) :], after_answer[len(asked) :]]
                is_answer += [False, True]
                done = after_answer
            num_pieces.append(len(pieces) - num_before)
        token_lists = (encoding.ids for encoding in self._tokenizer.encode_batch(pieces))
        flags = iter(is_answer)
        for count in num_pieces:
            tokens: list[int] = []
            wanted: list[int] = []
            for _ in range(count):
                piece = next(token_lists)
                tokens += piece
                wanted += piece if next(flags) else [IGNORED] * len(piece)
            yield tokens, [*wanted[1:], IGNORED]


def batches(
    sources: tuple[Documentation, Chats], random_source: random.Random, batch_size: int
) -> Iterator[Windows]:
    """Endless shuffled batches; each epoch draws every source anew."""
    while True:
        drawn = [source.windows(random_source) for source in sources]
        inputs, labels = (torch.cat(part) for part in zip(*drawn, strict=True))
        order = list(range(len(inputs)))
        random_source.shuffle(order)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield inputs[rows], labels[rows]
