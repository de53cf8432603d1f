"""The operator's command: what it shows, what it does, what it says when it cannot."""

import contextlib
import re
from collections.abc import AsyncGenerator

import grpc.aio
import pytest

from headway.errors import from_rpc_error
from headway.v1 import scheduler_pb2 as scheduler
from scheduler_svc import operate
from tests.scheduler.world import World, world


def snapshot() -> scheduler.Snapshot:
    """An executor that is drained for a cold model, a lost one, and who waits for them."""
    shot = scheduler.Snapshot(num_waiting=2, num_running=3, decisions={"granted": 7})
    shot.uptime.FromMilliseconds(61_500)
    one = shot.executors.add(
        executor_id="e1",
        state=scheduler.ExecutorRow.STATE_ATTACHED,
        num_slots=4,
        num_leased=3,
        resident_models=["common", "idle"],
        active_models=["common"],
        loading_model="rare",
    )
    one.reservation.model, one.reservation.reason = "rare", "drain"
    one.reservation.age.FromMilliseconds(1_500)
    one.reservation.remaining.FromMilliseconds(60_000)
    one.stats.num_leases, one.stats.share, one.stats.utilisation = 9, 0.75, 0.123
    one.stats.mean_duration.FromMilliseconds(1_234)
    one.stats.affinity = 0.5
    lost = scheduler.ExecutorRow.STATE_LOST
    shot.executors.add(executor_id="e2", state=lost, num_slots=2, num_in_doubt=1)
    first = shot.queue.add(
        request_id="req_1", model="rare", tenant="lab", band=1, priority=2.04, num_tokens=30
    )
    first.waited.FromMilliseconds(2_500)
    first.status.depth = 1
    first.status.estimated_wait.FromMilliseconds(9_000)
    second = shot.queue.add(request_id="req_2", model="common", band=2)
    second.status.position, second.status.depth = 3, 5
    shot.models.add(model="rare", num_requests=2, num_tokens=60, num_waiting=1, num_homes=0)
    broken = shot.models.add(model="broken", num_homes=0).load_failure
    broken.num_executors, broken.message = 2, "no such file"
    broken.refused_for.FromMilliseconds(4_000)
    shot.queue_wait.mean.FromMilliseconds(550)
    return shot


def test_a_snapshot_reads_like_tables() -> None:
    lines = operate.text_of(snapshot()).splitlines()
    assert [re.sub(" {2,}", " | ", line) for line in lines] == [
        "up 61.5 s, 2 wait, 3 run; waits of the last hour: mean 0.6 s, p10 0.0 s, p90 0.0 s",
        "",
        "executor | state | slots | in doubt | models | kept for"
        " | ended 1 h | share | used | mean | affinity",
        "e1 | attached | 3/4 | 0 | common (runs), idle, rare (loading)"
        " | rare (drain since 1.5 s, given up in 60.0 s) | 9 | 75 % | 12 % | 1.2 s | 50 %",
        "e2 | lost | 1/2 | 1 | - | - | 0 | - | - | - | -",
        "",
        "model | wait | run | homes | granted | tokens | sessions | loads",
        "rare | 1 | 0 | 0 | 2 | 60 | 0 | -",
        "broken | 0 | 0 | 0 | 0 | 0 | 0 | failed on 2: no such file; refused for 4.0 s",
        "",
        "place | model | tenant | band | waited | starts in | priority | tokens | request",
        "1 of 1 | rare | lab | 1 | 2.5 s | 9.0 s | 2.0 | 30 | req_1",
        "4 of 5 | common | - | 2 | 0.0 s | - | - | 0 | req_2",
        "",
        "decisions",
        "granted | 7",
    ]
    assert lines[2].index("kept for") == lines[3].index("rare (drain"), "columns stand in line"


def test_an_idle_scheduler_is_one_line() -> None:
    assert operate.text_of(scheduler.Snapshot()) == "up 0.0 s, 0 wait, 0 run"


def asked(own: World, *words: str) -> AsyncGenerator[str]:
    """What the command says to this scheduler's operator."""
    address = f"127.0.0.1:{own.process.port}"
    return operate.answers(operate.parse([*words, "--scheduler", address]))


async def test_an_executor_is_shown_drained_and_taken_back() -> None:
    async with world() as own:
        _, client = await own.pair()
        await client.submit()
        await client.accepted()
        assert await anext(asked(own, "drain", "e1")) == "e1 takes nothing new; 1 still run"
        assert "\ne1        draining  1/" in await anext(asked(own, "show"))
        assert await anext(asked(own, "undrain", "e1")) == "e1 takes new work"
        assert "\ne1        attached  1/" in await anext(asked(own, "show", "--rows", "1"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(asked(own, "drain", "nobody"))
        assert from_rpc_error(caught.value).message == "No such executor."


async def test_a_watch_shows_it_again_and_again() -> None:
    async with (
        world() as own,
        contextlib.aclosing(asked(own, "watch", "--interval-s", "0.1")) as looks,
    ):
        assert [(await anext(looks))[:3] for _ in range(2)] == ["up ", "up "]


@pytest.mark.parametrize(
    "words",
    [
        ["drain"],
        ["show", "e1"],
        ["show", "--rows", "0"],
        ["watch", "--interval-s", "0"],
        ["restart", "e1"],
        [],
    ],
)
def test_a_senseless_command_line_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        operate.parse(words)
    assert caught.value.code == 2


def test_without_a_scheduler_it_says_so() -> None:
    with pytest.raises(SystemExit) as caught:
        operate.main(["show", "--scheduler", "127.0.0.1:1"])
    assert caught.value.code == "127.0.0.1:1: The scheduler could not be reached."
