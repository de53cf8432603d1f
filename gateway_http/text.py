"""Text to token ids: a model's own tokenizer and chat template, and the threads they run in.

Templates come from the model's files only, never from a request, and run in jinja2's immutable
sandbox with the names that Hugging Face's templates expect and no others.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import structlog
from tokenizers import Tokenizer

from gateway_http.detokenize import Detokenizer
from gateway_http.settings import GatewaySettings
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

_log = structlog.get_logger()

T = TypeVar("T")
Message = dict[str, Any]

_MESSAGE_CHARS = 32  # what a message costs a template, in characters of text
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class _Tools:
    """What a model's files made possible."""

    tokenizer: Tokenizer | None
    hidden_ids: frozenset[int]
    longest_token_chars: int
    template: jinja2.Template | None
    template_names: dict[str, str]


class Text:
    """One model's way between text and tokens; refuses, by name, what its files do not allow."""

    def __init__(self, model: str, max_context_tokens: int, tools: _Tools, pool: "TextPool"):
        self._model = model
        self._max_context_tokens = max_context_tokens
        self._tools = tools
        self._pool = pool

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be used at all; token ids always can."""
        return self._tools.tokenizer is not None

    async def encode(self, text: str, field: str) -> list[int]:
        """The prompt's tokens, special ones added as the model's files say."""
        tokenizer = self._require_tokenizer(field)
        return await self._encode(tokenizer, text, True, field)

    async def encode_chat(self, messages: Sequence[Message], field: str) -> list[int]:
        """A chat's tokens; the template brings its own special tokens."""
        tokenizer = self._require_tokenizer(field)
        if self._tools.template is None:
            message = f"The model {self._model} has no chat template: use completions."
            raise HeadwayError(Reason.INVALID_REQUEST, message, field=field)
        size = sum(len(message["content"]) + _MESSAGE_CHARS for message in messages)
        if size <= self._pool.inline_chars:
            text = self._render(messages, field)
        else:
            text = await self._pool.run(self._render, messages, field)
        return await self._encode(tokenizer, text, False, field)

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """For one sample. Raises INVALID_REQUEST if the model has no tokenizer."""
        decode = self._require_tokenizer("model").decode
        return Detokenizer(decode, self._tools.hidden_ids, prompt)

    def token_text(self, token_id: int) -> str:
        """One token alone, special tokens as they are written; may be part of a character."""
        tokenizer = self._require_tokenizer("logprobs")
        return str(tokenizer.decode([token_id], skip_special_tokens=False))

    def _require_tokenizer(self, field: str) -> Tokenizer:
        if self._tools.tokenizer is None:
            message = f"The model {self._model} has no tokenizer: send token ids, not text."
            raise HeadwayError(Reason.INVALID_REQUEST, message, field=field)
        return self._tools.tokenizer

    async def _encode(
        self, tokenizer: Tokenizer, text: str, has_specials: bool, field: str
    ) -> list[int]:
        # No token is longer than the longest one, so this much text can never fit.
        if len(text) > self._max_context_tokens * self._tools.longest_token_chars:
            raise prompt_too_long(None, self._max_context_tokens, field)
        encode = partial(tokenizer.encode, text, add_special_tokens=has_specials)
        encoding = (
            encode() if len(text) <= self._pool.inline_chars else await self._pool.run(encode)
        )
        return list(encoding.ids)

    def _render(self, messages: Sequence[Message], field: str) -> str:
        """In a thread: what the template makes of the chat, cut off when it runs wild."""
        assert self._tools.template is not None
        pieces: list[str] = []
        left = self._pool.max_rendered_chars
        names = {**self._tools.template_names, "messages": messages, "add_generation_prompt": True}
        try:
            for piece in self._tools.template.generate(names, tools=None, documents=None):
                left -= len(piece)
                if left < 0:
                    raise prompt_too_long(None, self._max_context_tokens, field)
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, LookupError) as error:
            # Only what the template's author wrote may be told; the rest names Python internals.
            told = str(error) if isinstance(error, _Refused) else "it does not take these messages"
            message = f"The model's chat template refused: {told}."
            raise HeadwayError(Reason.INVALID_REQUEST, message, field=field) from None
        return "".join(pieces)


class TextPool:
    """A bounded number of threads and of jobs that wait for them."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._max_jobs = settings.max_text_jobs
        self._num_jobs = 0
        self._threads = ThreadPoolExecutor(settings.num_text_threads, thread_name_prefix="text")
        self.inline_chars = settings.inline_text_chars
        self.max_rendered_chars = settings.max_rendered_chars

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run it in a thread. Raises NO_CAPACITY when too many wait already."""
        if self._num_jobs >= self._max_jobs:
            raise HeadwayError(Reason.NO_CAPACITY, "Too many texts wait to be tokenised.")
        self._num_jobs += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, partial(function, *arguments))
        finally:
            self._num_jobs -= 1

    async def load(
        self, card: generation_pb2.ModelCard, assets: generation_pb2.ModelAssets
    ) -> Text:
        """Read a model's files."""
        tools = await self.run(_load, card, assets)
        return Text(card.name, card.max_context_tokens, tools, self)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def prompt_too_long(num_tokens: int | None, max_context_tokens: int, field: str) -> HeadwayError:
    """The refusal of a prompt that leaves no room for a single new token."""
    size = f"{num_tokens} tokens" if num_tokens is not None else "too much text"
    message = f"The prompt has {size}; the model's context takes {max_context_tokens} tokens."
    return HeadwayError(Reason.PROMPT_TOO_LONG, message, field=field)


def _load(card: generation_pb2.ModelCard, assets: generation_pb2.ModelAssets) -> _Tools:
    """In a thread. Files that cannot be read count as absent, so that token ids still work."""
    tokenizer, hidden, longest = None, frozenset(card.eos_token_ids), 1
    if assets.tokenizer_json:
        try:
            tokenizer = Tokenizer.from_buffer(assets.tokenizer_json)
        except Exception as error:  # tokenizers raises nothing more special
            _log.error("tokenizer.refused", model=card.name, cause=str(error))
        else:
            tokenizer.no_truncation()
            tokenizer.no_padding()
            added = tokenizer.get_added_tokens_decoder()
            hidden |= {token_id for token_id, token in added.items() if token.special}
            longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)
    template = None
    if assets.chat_template:
        try:
            template = _environment().from_string(assets.chat_template)
        except jinja2.TemplateError as error:
            _log.error("template.refused", model=card.name, cause=str(error))
    names = _special_names(assets.tokenizer_config_json)
    return _Tools(tokenizer, hidden, longest, template, names)


def _special_names(tokenizer_config_json: bytes) -> dict[str, str]:
    """The special tokens that templates write by name; a token is a string or has ``content``."""
    try:
        config = json.loads(tokenizer_config_json or b"{}")
    except ValueError:
        return {}
    names: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name) if isinstance(config, dict) else None
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            names[name] = value
    return names


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in Hugging Face: unlike jinja2's own filter it escapes nothing for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)
