"""Text to token ids, as a model's own files say: its tokenizer and its chat template.

Templates come from the model's files only, never from a request, and run in jinja2's immutable
sandbox with the names that Hugging Face's templates expect and no others. Everything here is
synchronous and knows no settings: it runs in the gateway for small texts, and in a process of its
own for all others (``text_worker``).
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
from tokenizers import Tokenizer

from headway.reasons import Reason

Message = dict[str, Any]

THINK_START, THINK_END = "<think>", "</think>"
_MESSAGE_CHARS = 32  # what a message costs a template, in characters of text
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_END_MARK = "\ue0ffend of the final message\ue0ff"


class TextError(Exception):
    """Text that cannot become tokens; ``message`` is for the client."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class TemplateError(TextError):
    """A template that does not take a chat, or cannot be read at all."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.INVALID_REQUEST, message)


class Chat(msgspec.Struct, kw_only=True):
    """What a template is given. ``names`` are further variables, already checked by name and type.

    ``continues_final_message``: the prompt ends within the last message, which goes on.
    ``answers_at_once``: a thought that the template opens for the model is closed again.
    ``answer_start`` is written for the model: the prompt ends with it.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    names: dict[str, Any] = {}
    has_generation_prompt: bool = True
    continues_final_message: bool = False
    answers_at_once: bool = False
    answer_start: str = ""

    def is_small(self, max_chars: int) -> bool:
        """Whether this costs little to render: not much text, and no values that a template may
        go through."""
        num_chars = 0
        for message in self.messages:
            if "tool_calls" in message:
                return False
            num_chars += _MESSAGE_CHARS + sum(map(len, message.values()))
        return not self.tools and num_chars <= max_chars


class ChatTemplate:
    """One model's template. Raises TemplateError if it cannot be read."""

    def __init__(self, source: str, special_names: dict[str, str], max_chars: int) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"The model's chat template cannot be read: {error}.") from None
        # jinja2 chains its environment's names to the template's, and copies them for each render
        self._template.globals = dict(self._template.globals)
        self._special_names = special_names
        self._max_chars = max_chars

    def render(self, chat: Chat) -> str:
        """The prompt as text. Raises TemplateError, or PROMPT_TOO_LONG when it runs wild."""
        text = self._run(chat)
        if chat.continues_final_message:
            text = text[: text.rindex(_END_MARK)]
        if chat.answers_at_once and opens_thought(text):
            text += f"\n{THINK_END}\n\n"
        return text + chat.answer_start

    def _run(self, chat: Chat) -> str:
        messages = chat.messages
        if chat.continues_final_message:
            final = {**messages[-1], "content": messages[-1]["content"] + _END_MARK}
            messages = [*messages[:-1], final]
        names = {
            "tools": None,
            "documents": None,
            **chat.names,
            **self._special_names,
            "messages": messages,
            "add_generation_prompt": chat.has_generation_prompt,
        }
        if chat.tools:
            names["tools"] = chat.tools
        pieces: list[str] = []
        left = self._max_chars
        try:
            for piece in self._template.generate(names):
                left -= len(piece)
                if left < 0:
                    raise TextError(Reason.PROMPT_TOO_LONG, "The chat makes too long a prompt.")
                pieces.append(piece)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            # Only what the template's author wrote may be told; the rest names Python internals.
            told = str(error) if isinstance(error, _Refused) else "it does not take these messages"
            raise TemplateError(f"The model's chat template refused: {told}.") from None
        text = "".join(pieces)
        if chat.continues_final_message and _END_MARK not in text:
            raise TemplateError("The model's chat template leaves out the final message.")
        return text


class Vocabulary:
    """One model's tokenizer. Raises TextError if it cannot be read."""

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # tokenizers raises nothing more special
            raise TextError(Reason.INVALID_REQUEST, f"cannot be read: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        names = self.tokenizer.get_vocab(with_added_tokens=True)
        self.longest_token_chars = max(map(len, names), default=1)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = {
            token.content: token_id for token_id, token in added.items() if token.special
        }

    def encode(self, text: str, has_specials: bool) -> list[int]:
        """Token ids; ``has_specials`` adds the ones that the files put around a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=has_specials).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text, without special tokens."""
        return str(self.tokenizer.decode(token_ids))

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """Text, with special tokens as they are written."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """One token alone, special tokens as they are written; may be part of a character."""
        return self.decode_all([token_id])

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of one token, part of a character or not; None where they cannot be known."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        name = self.tokenizer.id_to_token(token_id) or ""
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        if name and all(char in _BYTE_OF_CHAR for char in name):
            return bytes(_BYTE_OF_CHAR[char] for char in name)
        return None


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt leaves the model in the middle of a thought."""
    tail = prompt.rstrip()
    return tail.endswith(THINK_START)


def special_names(tokenizer_config_json: bytes) -> dict[str, str]:
    """The special tokens that templates write by name; a token is a string or has ``content``."""
    try:
        config = json.loads(tokenizer_config_json or b"{}")
    except (ValueError, RecursionError):
        return {}
    names: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name) if isinstance(config, dict) else None
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            names[name] = value
    return names


def _char_of_byte() -> dict[str, int]:
    """How byte-level BPE writes bytes (GPT-2): printable ones as they are, the others from 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_CHAR = _char_of_byte()


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
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
        optimized=False,  # or constants, such as a billion times a letter, are worked out here
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
