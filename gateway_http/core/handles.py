"""Which samples the numbers of one connection name.

Rule: numbers rise and are never used again, so that what still arrives under one that was given
back has no meaning.
"""

from gateway_http.core.messages import Stream

MAX_HANDLE = 2**32 - 1


class Handles:
    """A stream has a handle for each sample, the first of which it knows itself."""

    def __init__(self) -> None:
        self.samples: dict[int, tuple[Stream, int]] = {}
        """By handle: a stream and the number of its sample."""
        self._next = 1

    @property
    def are_exhausted(self) -> bool:
        """This connection has none left: open a new one."""
        return self._next > MAX_HANDLE // 2

    def stream(self, handle: int) -> Stream | None:
        """Whose it is."""
        entry = self.samples.get(handle)
        return entry[0] if entry is not None else None

    def assign(self, stream: Stream) -> int:
        """The next ones, for all samples; gives the first."""
        assert stream.handle == 0
        handle = stream.handle = self._next
        self._next += stream.num_samples
        for number in range(stream.num_samples):
            self.samples[handle + number] = (stream, number)
        return handle

    def release(self, stream: Stream) -> None:
        """Take them back."""
        if stream.handle:
            for handle in range(stream.handle, stream.handle + stream.num_samples):
                del self.samples[handle]
            stream.handle = 0

    def clear(self) -> None:
        """The connection is gone, and its numbers with it. Streams forget theirs themselves."""
        self.samples.clear()
        self._next = 1
