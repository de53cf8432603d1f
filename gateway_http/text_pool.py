"""Worker processes for text, and a bounded line before them.

A worker that dies, by the time limit or the memory limit, takes one job with it, and is started
again for the next one.
"""

import asyncio
import contextlib
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from gateway_http import text_worker
from gateway_http.settings import GatewaySettings
from gateway_http.text import (
    ChatTemplate,
    TemplateError,
    TextError,
    Vocabulary,
    special_names,
)
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2

_log = structlog.get_logger()

T = TypeVar("T")

_TOO_MUCH = "This text takes more time or memory than the gateway has for one."


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a model's files made possible. ``key`` names their content."""

    key: str
    vocabulary: Vocabulary | None = None
    template: ChatTemplate | None = None
    load_vocabulary: text_worker.LoadVocabulary | None = None
    load_template: text_worker.LoadTemplate | None = None

    @property
    def template_source(self) -> str:
        """Empty if there is none."""
        return self.load_template.source if self.load_template is not None else ""


class TextPool:
    """A bounded number of worker processes, and of jobs that wait for them."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self._num_jobs = 0
        # Threads only wait for their workers, except when there are none.
        num_threads = max(1, settings.num_text_workers)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="text")
        self._workers = [_Process(settings) for _ in range(settings.num_text_workers)]
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    @property
    def has_workers(self) -> bool:
        """Whether anything can be interrupted."""
        return bool(self._workers)

    async def run(self, function: Callable[[], T]) -> T:
        """Run it in a thread. Raises NO_CAPACITY when too many wait already."""
        if self._num_jobs >= self.settings.max_text_jobs:
            raise HeadwayError(Reason.NO_CAPACITY, "Too many texts wait to be tokenised.")
        self._num_jobs += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        finally:
            self._num_jobs -= 1

    async def ask(self, job: text_worker.Work, files: ModelFiles) -> text_worker.Answer:
        """Have a worker do it. Raises TextError, or NO_CAPACITY."""
        return await self.run(partial(self._ask, job, files))

    def _ask(self, job: text_worker.Work, files: ModelFiles) -> text_worker.Answer:
        worker = self._free.get()
        try:
            answer = worker.call(job)
            if isinstance(answer, text_worker.Missing):
                is_render = isinstance(job, text_worker.Render)
                load = files.load_template if is_render else files.load_vocabulary
                assert load is not None
                worker.call(load)
                answer = worker.call(job)
            return answer
        finally:
            self._free.put(worker)

    async def load(
        self, card: generation_pb2.ModelCard, assets: generation_pb2.ModelAssets
    ) -> ModelFiles:
        """Read a model's files; those that cannot be read count as absent."""
        return await self.run(partial(_load, card, assets, self.settings.max_rendered_chars))

    def close(self) -> None:
        """End the workers, and let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=not self._workers)
        for worker in self._workers:
            worker.close()


class _Process:
    """One worker, started when it is needed and again when it died. One thread at a time calls."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def call(self, job: text_worker.Job) -> text_worker.Answer:
        """Raises TextError: the job's own, or because the worker did not live to answer it."""
        with self._lock:
            return self._call(job)

    def _call(self, job: text_worker.Job) -> text_worker.Answer:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            text_worker.write_frame(process.stdin, job)
            data = text_worker.read_frame(process.stdout)
            answer: text_worker.Answer = _DECODER.decode(data)
        except (EOFError, OSError, ValueError):
            self._end()
            if self._is_closed:
                raise _closed() from None
            _log.warning("text_worker.lost", job=type(job).__name__)
            raise TextError(Reason.INVALID_REQUEST, _TOO_MUCH) from None
        if isinstance(answer, text_worker.Refused):
            raise TextError(Reason(answer.reason), answer.message)
        return answer

    def close(self) -> None:
        """Kill it; whoever waits for it is told DRAINING."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()  # a thread that waits for it gets the end of the pipe
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise _closed()
        if self._process is not None and self._process.poll() is not None:
            self._end()  # it died between two jobs, by nobody's fault here
        if self._process is None:
            limits = (
                self._settings.max_text_worker_bytes,
                self._settings.text_timeout_s,
                self._settings.text_load_timeout_s,
            )
            self._process = subprocess.Popen(  # noqa: S603 (our own program, our own numbers)
                [sys.executable, "-m", text_worker.__name__, *map(str, limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # what was not written will not be missed
                    pipe.close()
            self._process = None


def _closed() -> TextError:
    return TextError(Reason.DRAINING, "This gateway is shutting down.")


_DECODER = msgspec.msgpack.Decoder(text_worker.Answer)


def _load(
    card: generation_pb2.ModelCard, assets: generation_pb2.ModelAssets, max_chars: int
) -> ModelFiles:
    """In a thread. Files that cannot be read count as absent, so that token ids still work."""
    key = f"{card.name}\n{card.assets_digest}"
    vocabulary, load_vocabulary = None, None
    if assets.tokenizer_json:
        try:
            vocabulary = Vocabulary(assets.tokenizer_json)
        except TextError as error:
            _log.error("tokenizer.refused", model=card.name, cause=error.message)
        else:
            load_vocabulary = text_worker.LoadVocabulary(key, assets.tokenizer_json)
    template, load_template = None, None
    if assets.chat_template:
        names = special_names(assets.tokenizer_config_json)
        try:
            template = ChatTemplate(assets.chat_template, names, max_chars)
        except TemplateError as error:
            _log.error("template.refused", model=card.name, cause=error.message)
        else:
            load_template = text_worker.LoadTemplate(key, assets.chat_template, names, max_chars)
    return ModelFiles(key, vocabulary, template, load_vocabulary, load_template)
