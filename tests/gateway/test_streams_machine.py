"""Random histories against a model scheduler whose connection loses, repeats and breaks."""

import zlib
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from gateway_http.core.frames import Frame
from gateway_http.core.messages import Commands, Ended, Resume, SampleEnded, Stream, Submit, Tokens
from gateway_http.core.streams import Streams
from headway.reasons import Reason
from tests.gateway.streams_at_work import MAX_RESUMES

NUM_TOKENS = 4


def path(key: str, sample: int) -> list[int]:
    """The one true token sequence of a sample: so every repeat agrees."""
    return [zlib.crc32(f"{key} {sample} {index}".encode()) for index in range(NUM_TOKENS)]


class ModelRun:
    def __init__(self, key: str, num_samples: int) -> None:
        self.key = key
        self.num_made = [0] * num_samples
        self.is_cancelled = False

    @property
    def is_done(self) -> bool:
        return self.is_cancelled or all(made == NUM_TOKENS for made in self.num_made)


class Machine(RuleBasedStateMachine):
    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.streams = Streams(MAX_RESUMES)
        self.runs: dict[str, ModelRun] = {}
        self.followed: dict[int, tuple[ModelRun, list[int], list[bool]]] = {}
        self.wire: list[Callable[[], object]] = []  # to the gateway, in order
        self.read: dict[int, list[list[int]]] = {}
        self.ends: dict[int, int] = {}
        self.opened: list[tuple[Stream, str]] = []
        self.cancelled: set[int] = set()
        self.is_connected = False
        self.last_handle = 0

    @initialize()
    def start(self) -> None:
        self.connect()

    @rule(target=live, num_samples=st.integers(1, 3), is_kept=st.booleans())
    def open(self, num_samples: int, is_kept: bool) -> Stream:
        key = f"{'kept' if is_kept else 'key'}-{len(self.opened)}"
        stream = self.streams.open(
            (key, num_samples),
            num_samples=num_samples,
            num_bytes=1,
            is_kept=is_kept,
            on_change=lambda: None,
        )
        self.opened.append((stream, key))
        self.read[stream.key] = [[] for _ in range(num_samples)]
        self.ends[stream.key] = 0
        return stream

    @rule(stream=consumes(live))
    def cancel(self, stream: Stream) -> None:
        if not self.ends[stream.key]:
            self.cancelled.add(stream.key)
        self.streams.cancel(stream)

    @precondition(lambda self: not self.is_connected)
    @rule()
    def connect(self) -> None:
        self.is_connected = True
        self.last_handle = 0
        self.streams.connected()

    @precondition(lambda self: self.is_connected)
    @rule()
    def disconnect(self) -> None:
        self.is_connected = False
        self.followed.clear()
        self.wire.clear()
        self.streams.disconnected()

    @precondition(lambda self: self.is_connected)
    @rule(max_bytes=st.integers(1, 4))
    def write(self, max_bytes: int) -> None:
        self.handle(self.streams.take(max_bytes))

    def handle(self, commands: Commands) -> None:
        """The model scheduler; also checks the contract of handles."""
        started: list[Submit | Resume] = [*commands.submits, *commands.resumes]
        for command in started:
            assert command.handle > self.last_handle
            key, num_samples = command.payload
            self.last_handle = command.handle + num_samples - 1
            run = self.runs.setdefault(key, ModelRun(key, num_samples))
            cursors = list(getattr(command, "next_index", [0] * num_samples))
            self.followed[command.handle] = (run, cursors, [False] * num_samples)
            self.accept(command.handle, key)
        for cancel in commands.cancels:
            if cancel.handle in self.followed:
                run = self.followed[cancel.handle][0]
                assert cancel.is_leaving == run.key.startswith("kept")
                if cancel.is_leaving:
                    del self.followed[cancel.handle]
                else:
                    run.is_cancelled = True

    def accept(self, handle: int, key: str) -> None:
        self.wire.append(lambda: self.streams.on_accepted(handle, key, None))

    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        running = [run for run in self.runs.values() if not run.is_done]
        if running:
            run = data.draw(st.sampled_from(running))
            sample = data.draw(st.integers(0, len(run.num_made) - 1))
            run.num_made[sample] = min(NUM_TOKENS, run.num_made[sample] + 1)

    @rule(is_lost=st.booleans(), overlap=st.integers(0, 2))
    def publish(self, is_lost: bool, overlap: int) -> None:
        """Frames with overlap, or a frame lost in a live connection, which must not be."""
        for handle, (run, cursors, told) in list(self.followed.items()):
            handles, indexes, tokens, ends = [], [], [], []
            for sample, made in enumerate(run.num_made):
                for index in range(max(0, cursors[sample] - overlap), made):
                    handles.append(handle + sample)
                    indexes.append(index)
                    tokens.append(path(run.key, sample)[index])
                cursors[sample] = made
                if made == NUM_TOKENS and not told[sample]:
                    told[sample] = True
                    ends.append((handle + sample, NUM_TOKENS, None))
            if not is_lost:
                self.send_frame(handles, indexes, tokens, ends)
            if run.is_done:
                del self.followed[handle]
                self.send_finished(handle)

    def send_frame(
        self,
        handles: list[int],
        indexes: list[int],
        tokens: list[int],
        ends: list[tuple[int, int, None]],
    ) -> None:
        self.wire.append(lambda: self.streams.on_frame(Frame(handles, indexes, tokens, [], ends)))

    def send_finished(self, handle: int) -> None:
        self.wire.append(lambda: self.streams.on_finished(handle, None, None))

    @rule(count=st.integers(1, 5))
    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.wire))):
            self.wire.pop(0)()

    @rule()
    def consume(self) -> None:
        for stream, key in self.opened:
            for event in stream.read():
                assert self.ends[stream.key] == 0, "an event after the end"
                if isinstance(event, Tokens):
                    got = self.read[stream.key][event.sample]
                    assert event.first_index == len(got)
                    got += event.token_ids
                    assert got == path(key, event.sample)[: len(got)]
                elif isinstance(event, SampleEnded):
                    assert len(self.read[stream.key][event.sample]) == NUM_TOKENS
                elif isinstance(event, Ended):
                    self.ends[stream.key] += 1
                    self.check_end(stream, event)

    def check_end(self, stream: Stream, event: Ended) -> None:
        if event.failure is None:
            assert all(len(got) == NUM_TOKENS for got in self.read[stream.key])
        elif event.failure.reason is Reason.CANCELLED:
            assert stream.key in self.cancelled
        else:  # too many lost frames in a row without progress
            assert event.failure.reason is Reason.INTERNAL
            assert stream.num_resumes > 0

    @invariant()
    def every_stream_holds_a_prefix(self) -> None:
        for stream, key in self.opened:
            for number, sample in enumerate(stream.samples):
                assert sample.token_ids == path(key, number)[: len(sample.token_ids)]

    def teardown(self) -> None:
        """Once the connection holds, everything ends, and nothing is left behind."""
        if not self.is_connected:
            self.connect()
        for _ in range(10):
            while commands := self.streams.take(1 << 20):
                self.handle(commands)
            for run in self.runs.values():
                run.num_made = [NUM_TOKENS] * len(run.num_made)
            self.publish(False, 1)
            self.deliver(len(self.wire))
            self.consume()
        assert len(self.streams) == 0
        assert all(count == 1 for count in self.ends.values())


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStreams = Machine.TestCase
