"""A process that does one gateway's heavy text work, so that nothing of it can stop the gateway.

Run as ``python -m gateway_http.text_worker MAX_BYTES JOB_TIMEOUT_S LOAD_TIMEOUT_S``. Frames on
stdin and stdout: four bytes of length, then msgpack. A job that takes longer than its limit, or
more memory, ends the process: the kernel's alarm needs nobody's help, not even the interpreter's.
So does the end of stdin, that is of the gateway. Nothing but the parts of ``text`` is loaded here.
"""

import os
import resource
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, TypeVar

import msgspec

from gateway_http.text import Chat, ChatTemplate, TextError, Vocabulary

_MAX_MODELS = 16  # in one worker's memory; the gateway sends a file again when it is gone
_SIZE_BYTES = 4

Kept = TypeVar("Kept")


class LoadTemplate(msgspec.Struct, tag=True):
    """Keep a template under a key."""

    key: str
    source: str
    special_names: dict[str, str]
    max_chars: int


class LoadVocabulary(msgspec.Struct, tag=True):
    """Keep a tokenizer under a key."""

    key: str
    tokenizer_json: bytes


class Render(msgspec.Struct, tag=True):
    """Answered by the prompt's text."""

    key: str
    chat: Chat


class Encode(msgspec.Struct, tag=True):
    """Answered by token ids."""

    key: str
    text: str
    has_specials: bool


class Decode(msgspec.Struct, tag=True):
    """Answered by text, with special tokens as they are written."""

    key: str
    token_ids: list[int]


class Loaded(msgspec.Struct, tag=True):
    """A file is kept."""


class Rendered(msgspec.Struct, tag=True):
    """A prompt, and what it cost the processor."""

    text: str
    cpu_s: float


class Encoded(msgspec.Struct, tag=True):
    """Token ids."""

    token_ids: list[int]


class Decoded(msgspec.Struct, tag=True):
    """The text of token ids."""

    text: str


class Missing(msgspec.Struct, tag=True):
    """The key is not kept here, or not any more: load it."""


class Refused(msgspec.Struct, tag=True):
    """A TextError."""

    reason: str
    message: str


Work = Render | Encode | Decode
Job = LoadTemplate | LoadVocabulary | Work
Answer = Loaded | Rendered | Encoded | Decoded | Missing | Refused


def write_frame(pipe: IO[bytes], message: Job | Answer) -> None:
    """Send one message."""
    data = msgspec.msgpack.encode(message)
    pipe.write(len(data).to_bytes(_SIZE_BYTES, "little"))
    pipe.write(data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes:
    """Receive one message's bytes. Raises EOFError when the other side is gone."""
    size = int.from_bytes(_read(pipe, _SIZE_BYTES), "little")
    return _read(pipe, size)


def _read(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


class Worker:
    """Does jobs, and keeps the files that they need."""

    def __init__(self) -> None:
        self._templates: OrderedDict[str, ChatTemplate] = OrderedDict()
        self._vocabularies: OrderedDict[str, Vocabulary] = OrderedDict()

    def do(self, job: Job) -> Answer:
        """One job; what it refuses is an answer, too."""
        try:
            match job:
                case LoadTemplate():
                    template = ChatTemplate(job.source, job.special_names, job.max_chars)
                    return _keep(self._templates, job.key, template)
                case LoadVocabulary():
                    return _keep(self._vocabularies, job.key, Vocabulary(job.tokenizer_json))
                case Render():
                    return _use(self._templates, job.key, lambda one: _render(one, job.chat))
                case Decode():
                    return _use(self._vocabularies, job.key, lambda one: _decode(one, job))
                case Encode():
                    return _use(self._vocabularies, job.key, lambda one: _encode(one, job))
        except TextError as error:
            return Refused(error.reason.value, error.message)


def _keep(kept: OrderedDict[str, Kept], key: str, value: Kept) -> Loaded:
    kept[key] = value
    while len(kept) > _MAX_MODELS:
        kept.popitem(last=False)
    return Loaded()


def _use(kept: OrderedDict[str, Kept], key: str, function: Callable[[Kept], Answer]) -> Answer:
    if key not in kept:
        return Missing()
    kept.move_to_end(key)
    return function(kept[key])


def _render(template: ChatTemplate, chat: Chat) -> Answer:
    started = time.process_time()
    text = template.render(chat)
    return Rendered(text, time.process_time() - started)


def _encode(vocabulary: Vocabulary, job: Encode) -> Answer:
    return Encoded(vocabulary.encode(job.text, job.has_specials))


def _decode(vocabulary: Vocabulary, job: Decode) -> Answer:
    return Decoded(vocabulary.decode_all(job.token_ids))


def main() -> None:
    """Until stdin ends, or a limit is hit."""
    max_bytes, (job_timeout_s, load_timeout_s) = int(sys.argv[1]), map(float, sys.argv[2:])
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the gateway, which ends us
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up among the frames
    decoder = msgspec.msgpack.Decoder(Job)
    worker = Worker()
    while True:
        try:
            data = read_frame(jobs)
        except EOFError:
            return
        job: Job = decoder.decode(data)
        is_load = isinstance(job, LoadTemplate | LoadVocabulary)
        signal.setitimer(signal.ITIMER_REAL, load_timeout_s if is_load else job_timeout_s)
        answer = worker.do(job)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(answers, answer)


if __name__ == "__main__":
    main()
