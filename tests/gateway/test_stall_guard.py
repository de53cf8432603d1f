"""Who is cut off: whoever takes nothing, never whoever is merely slow."""

import asyncio

import pytest

from gateway_http.stall_guard import StallGuard

WAIT_S = 60.0


class Connection:
    """Has so many bytes left, one look after the other, and the last number for ever."""

    def __init__(self, *sizes: int) -> None:
        self._sizes = list(sizes)
        self.num_looks = 0
        self.seen_all = asyncio.Event()
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        self.num_looks += 1
        if len(self._sizes) == 1:
            self.seen_all.set()
            return self._sizes[0]
        return self._sizes.pop(0)

    def abort(self) -> None:
        self.is_aborted = True


async def write(guard: StallGuard, until: asyncio.Event) -> None:
    guard.num_writes += 1
    guard.is_writing = True
    await asyncio.wait_for(until.wait(), WAIT_S)
    guard.is_writing = False


async def test_whoever_takes_nothing_is_cut_off() -> None:
    connection = Connection(9)
    guard = StallGuard(0.004, connection)
    with pytest.raises(asyncio.CancelledError):
        await write(guard, until=asyncio.Event())
    assert (guard.cause, connection.is_aborted) == ("stalled", True)
    assert connection.num_looks == 5, "the time limit, after the first look"


async def test_whoever_takes_a_little_is_left_alone() -> None:
    sizes = [size for size in range(20, 0, -1) for _ in range(4)]
    connection = Connection(*sizes, 0)
    guard = StallGuard(0.004, connection)
    await write(guard, until=connection.seen_all)
    guard.close()
    assert (guard.cause, connection.is_aborted) == (None, False)


async def test_a_new_write_is_progress_though_as_much_is_left() -> None:
    looks = asyncio.Queue[None]()

    class Busy(Connection):
        def get_write_buffer_size(self) -> int:
            looks.put_nowait(None)
            return 9

    guard = StallGuard(0.004, Busy(9))
    for _ in range(20):
        guard.num_writes += 1
        guard.is_writing = True
        for _ in range(3):
            await asyncio.wait_for(looks.get(), WAIT_S)
        guard.is_writing = False
    guard.close()
    assert guard.cause is None


async def test_a_gateway_that_was_held_up_itself_blames_nobody() -> None:
    connection = Connection(9)
    loop = asyncio.get_running_loop()
    guard = StallGuard(0.02, connection)
    writing = asyncio.create_task(write(guard, until=asyncio.Event()))
    await asyncio.wait_for(connection.seen_all.wait(), WAIT_S)
    held_until = loop.time() + 0.1
    while loop.time() < held_until:  # the whole process is at something else
        pass
    await asyncio.sleep(0)  # one turn of the loop, and so one look at most
    assert guard.cause is None
    guard.close()
    writing.cancel()


@pytest.mark.parametrize("is_writing", [False, True])
async def test_only_a_reader_that_holds_up_its_writer_can_fall_behind(is_writing: bool) -> None:
    connection = Connection(9)
    guard = StallGuard(60, connection)
    guard.is_writing = is_writing
    guard.fall_behind()
    assert connection.is_aborted == is_writing
    guard.close()
    if is_writing:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
