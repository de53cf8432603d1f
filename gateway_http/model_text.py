"""One model's way between text and tokens: what is small at once, all else in the pool.

A hop to a worker costs more than a short text does, and a long text would hold up every stream of
this gateway. So a text goes to a worker from ``inline_text_chars`` on, and a template, which could
do anything, until it has shown in a worker that it is quick; a template that is slow afterwards
goes back there.
"""

import time
from collections.abc import Sequence
from functools import partial

from gateway_http import text_worker
from gateway_http.detokenize import Detokenizer
from gateway_http.text import Chat, TextError, Vocabulary
from gateway_http.text_pool import ModelFiles, TextPool
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

QUICK_RENDER_S = 0.002  # a template that needs more for a small chat is never rendered inline
_MAX_CACHED_TOKENS = 1 << 18  # texts of single tokens, one model's


class Text:
    """One model's way between text and tokens; refuses, by name, what its files do not allow."""

    def __init__(self, card: generation_pb2.ModelCard, files: ModelFiles, pool: TextPool) -> None:
        self._model = card.name
        self._max_context_tokens = card.max_context_tokens
        self._files = files
        self._pool = pool
        self._inline_chars = pool.settings.inline_text_chars
        self._is_template_quick = False
        self._token_texts: dict[int, str] = {}
        specials = files.vocabulary.special_ids if files.vocabulary is not None else {}
        self._special_ids = specials
        self._hidden_ids = frozenset(card.eos_token_ids) | frozenset(specials.values())

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be used at all; token ids always can."""
        return self._files.vocabulary is not None

    @property
    def template_source(self) -> str:
        """The chat template, to see what it knows; empty if there is none."""
        return self._files.template_source

    async def encode(
        self, text: str, field: str, has_specials: bool = True, *, is_prompt: bool = True
    ) -> list[int]:
        """The text's tokens; ``has_specials`` puts special ones around it as the files say.

        Raises PROMPT_TOO_LONG for a prompt that cannot fit, and for any text far beyond it.
        """
        vocabulary = self._require_vocabulary(field)
        # No token is longer than the longest one, so this much text can never fit.
        if len(text) > self._max_context_tokens * vocabulary.longest_token_chars:
            raise prompt_too_long(None, self._max_context_tokens, field)
        with _Told(field):
            if len(text) <= self._inline_chars:
                token_ids = vocabulary.encode(text, has_specials)
            elif self._pool.has_workers:
                job = text_worker.Encode(self._files.key, text, has_specials)
                answer = await self._pool.ask(job, self._files)
                assert isinstance(answer, text_worker.Encoded)
                token_ids = answer.token_ids
            else:
                token_ids = await self._pool.run(partial(vocabulary.encode, text, has_specials))
        if is_prompt and len(token_ids) >= self._max_context_tokens:
            raise prompt_too_long(len(token_ids), self._max_context_tokens, field)
        return token_ids

    async def render_chat(self, chat: Chat, field: str) -> str:
        """A chat as the model's template writes it. Raises INVALID_REQUEST if it refuses."""
        self._require_vocabulary(field)
        template = self._files.template
        if template is None:
            message = f"The model {self._model} has no chat template: use completions."
            raise HeadwayError(Reason.INVALID_REQUEST, message, field=field)
        is_small = chat.is_small(self._inline_chars)
        with _Told(field):
            if not self._pool.has_workers:
                if is_small:
                    return template.render(chat)
                return await self._pool.run(partial(template.render, chat))
            if is_small and self._is_template_quick:
                # not the thread's own time, which is a system call: a worker knows it exactly
                started = time.monotonic()
                text = template.render(chat)
                self._is_template_quick = time.monotonic() - started < 5 * QUICK_RENDER_S
                return text
            answer = await self._pool.ask(text_worker.Render(self._files.key, chat), self._files)
            assert isinstance(answer, text_worker.Rendered)
            if is_small:
                self._is_template_quick = answer.cpu_s < QUICK_RENDER_S
            return answer.text

    def detokenizer(self, prompt: Sequence[int], shown: Sequence[str] = ()) -> Detokenizer:
        """For one sample; special tokens have no text, but for the ``shown`` ones.

        Raises INVALID_REQUEST if the model has no tokenizer.
        """
        vocabulary = self._require_vocabulary("model")
        shown_ids = {self._special_ids[name]: name for name in shown if name in self._special_ids}
        return Detokenizer(vocabulary.decode, self._hidden_ids, prompt, shown_ids)

    async def decode(self, token_ids: Sequence[int], field: str) -> str:
        """Text with special tokens as they are written."""
        vocabulary = self._require_vocabulary(field)
        with _Told(field):
            if len(token_ids) <= self._inline_chars:
                return vocabulary.decode_all(token_ids)
            if not self._pool.has_workers:
                return await self._pool.run(partial(vocabulary.decode_all, token_ids))
            job = text_worker.Decode(self._files.key, list(token_ids))
            answer = await self._pool.ask(job, self._files)
            assert isinstance(answer, text_worker.Decoded)
            return answer.text

    def token_text(self, token_id: int) -> str:
        """One token alone, special tokens as they are written; may be part of a character."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._require_vocabulary("logprobs").token_text(token_id)
            if len(self._token_texts) < _MAX_CACHED_TOKENS:
                self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of one token, part of a character or not; None where they cannot be known."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        return self._require_vocabulary("logprobs").token_bytes(token_id)

    def _require_vocabulary(self, field: str) -> Vocabulary:
        if self._files.vocabulary is None:
            message = f"The model {self._model} has no tokenizer: send token ids, not text."
            raise HeadwayError(Reason.INVALID_REQUEST, message, field=field)
        return self._files.vocabulary


class _Told:
    """A TextError that leaves this block is the client's, about ``field``."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TextError):
            raise HeadwayError(error.reason, error.message, field=self._field) from None


def prompt_too_long(num_tokens: int | None, max_context_tokens: int, field: str) -> HeadwayError:
    """The refusal of a prompt that leaves no room for a single new token."""
    size = f"{num_tokens} tokens" if num_tokens is not None else "too much text"
    # by these words some clients know that they have to shorten it
    context = f"This model's maximum context length is {max_context_tokens} tokens"
    message = f"{context}; the prompt has {size}."
    return HeadwayError(Reason.PROMPT_TOO_LONG, message, field=field)
