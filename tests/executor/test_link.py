"""The executor process, without the process: real gRPC against a scheduler that the test plays."""

import asyncio
import math

import pytest

from executor_svc.mock_formulas import mock_tokens
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from tests.executor.linked import LONG, VOCAB, Executor, grant, ref
from tests.executor.scripted_scheduler import TIMEOUT_S, Attachment, ScriptedScheduler


def expected(handle: int, stop: int, start: int = 0) -> list[int]:
    return mock_tokens((handle,), seed=3, sample=0, start=start, stop=stop, vocab_size=VOCAB)


async def test_from_hello_to_acknowledged_end(
    scheduler: ScriptedScheduler, executor: Executor
) -> None:
    attachment = await scheduler.welcomed(wanted_assets=["mock", "nobody's"])
    hello = attachment.hello
    assert (hello.executor_id, hello.incarnation) == ("e1", "i1")
    assert (hello.capacity.num_slots, hello.capacity.max_models) == (256, 1)
    assert [offer.card.name for offer in hello.models] == ["mock", "other"]
    report = await attachment.next("report")
    assert [assets.model for assets in report.assets] == ["mock"]

    attachment.order(grants=[grant("a", 1), grant("b", 2, logprobs=True)])
    for request_id in ("a", "b"):
        ended = await attachment.until_ended(request_id)
        assert ended.outcome == fleet.LeaseEnded.OUTCOME_COMPLETED
        assert list(ended.num_tokens) == [5]
    assert attachment.tokens == {1: expected(1, 5), 2: expected(2, 5)}
    assert attachment.ends[1].reason == generation.FINISH_REASON_LENGTH
    assert not any(math.isnan(p) for p in attachment.logprobs[2])
    heartbeat = await attachment.next("heartbeat")
    assert (list(heartbeat.handles), heartbeat.last_handle) == ([1, 2], 2)
    attachment.order(acknowledged=[ref("a"), ref("b")])
    while heartbeat.handles:
        heartbeat = await attachment.next("heartbeat")
    assert heartbeat.last_handle == 2
    assert heartbeat.num_steps >= 5


async def test_a_resumed_grant_goes_on(scheduler: ScriptedScheduler, executor: Executor) -> None:
    attachment = await scheduler.welcomed()
    resumed = grant("a", 1)
    resumed.generated.add(token_ids=expected(1, 3))
    attachment.order(grants=[resumed])
    await attachment.until_ended("a")
    assert attachment.tokens == {1: expected(1, 5, start=3)}


async def test_a_broken_stream_is_adopted_and_goes_on(
    scheduler: ScriptedScheduler, executor: Executor
) -> None:
    first = await scheduler.welcomed()
    wide = grant("c", 3, LONG)
    wide.request.num_samples = 2
    first.order(grants=[grant("a", 1, LONG), grant("b", 2), wide])
    await first.until_ended("b")
    await first.until_tokens(1, 10)
    first.close(HeadwayError(Reason.STALE_LEASE, "go away"))

    second = await scheduler.attached()
    held = {lease.lease.request_id: lease for lease in second.hello.leases}
    assert sorted(held) == ["a", "b", "c"]
    assert held["b"].ended
    assert held["a"].num_tokens[0] >= len(first.tokens[1])
    assert {lease.model for lease in held.values()} == {"mock"}
    assert [held[name].num_slots for name in "abc"] == [1, 1, 2]
    adopts = [
        fleet.Adopt(held=ref("b"), lease=ref("b", 2), handle=7, next_index=[5]),
        fleet.Adopt(held=ref("a"), lease=ref("a", 2), handle=8, next_index=[4]),
    ]
    second.welcome(adopts=adopts)
    ended = await second.until_ended("b")
    assert ended.lease == ref("b", 2)
    await second.until_tokens(8, 20)
    assert second.tokens[8] == expected(1, 4 + len(second.tokens[8]), start=4)
    assert 7 not in second.tokens
    heartbeat = await second.next("heartbeat")
    assert sorted(heartbeat.handles) == [7, 8]  # c was not adopted, and is forgotten


async def test_orphans_are_stopped_while_no_scheduler_answers(
    scheduler: ScriptedScheduler, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_aborted = asyncio.Event()
    abort, loop = executor.engine.abort, asyncio.get_running_loop()

    def watched_abort(key: int) -> None:
        abort(key)
        loop.call_soon_threadsafe(was_aborted.set)

    monkeypatch.setattr(executor.engine, "abort", watched_abort)
    first = await scheduler.welcomed(orphan_grace_ms=30)
    first.order(grants=[grant("a", 1, LONG)])
    await first.until_tokens(1, 1)
    first.close()
    second = await scheduler.attached()
    assert second.hello.leases
    async with asyncio.timeout(TIMEOUT_S):
        await was_aborted.wait()
    second.welcome(adopts=[fleet.Adopt(held=ref("a"), lease=ref("a", 2), handle=1)])
    assert (await second.until_ended("a")).outcome == fleet.LeaseEnded.OUTCOME_UNKNOWN


async def test_revokes_and_bad_grants_are_answered(
    scheduler: ScriptedScheduler, executor: Executor
) -> None:
    attachment = await scheduler.welcomed()
    bad = grant("bad", 2, temperature=math.nan)
    other_model = grant("other", 3)
    other_model.request.model = "unknown"
    unset = grant("unset", 4)
    unset.request.sampling.ClearField("max_tokens")
    attachment.order(
        grants=[grant("a", 1, LONG), bad, other_model, unset, grant("again", 1), fleet.Grant()],
        revokes=[ref("stranger"), fleet.LeaseRef()],
    )
    reasons = {}
    for name in ("bad", "other", "unset", "again"):
        ended = await attachment.until_ended(name)
        assert ended.outcome == fleet.LeaseEnded.OUTCOME_FAILED
        reasons[name] = ended.failure.reason
    assert reasons == {
        "bad": "INVALID_REQUEST",
        "other": "MODEL_NOT_FOUND",
        "unset": "INVALID_REQUEST",
        "again": "INTERNAL",
    }
    assert (await attachment.until_ended("stranger")).outcome == fleet.LeaseEnded.OUTCOME_UNKNOWN
    attachment.order(revokes=[ref("a")])
    assert (await attachment.until_ended("a")).outcome == fleet.LeaseEnded.OUTCOME_REVOKED


async def test_a_scheduler_that_speaks_out_of_turn_is_left_and_found_again(
    scheduler: ScriptedScheduler, executor: Executor
) -> None:
    early = await scheduler.attached()
    early.order(revokes=[ref("a")])  # before its welcome
    twice = await scheduler.welcomed()
    twice.welcome()
    await scheduler.welcomed(timeout_ms=50)  # and silent from then on
    closing = await scheduler.welcomed()
    closing.close()
    healthy = await scheduler.welcomed()
    healthy.order(grants=[grant("a", 1)])
    await healthy.until_ended("a")


async def until_changed(attachment: Attachment, count: int) -> list[fleet.ModelChange]:
    changes: list[fleet.ModelChange] = []
    while len(changes) < count:
        changes += (await attachment.next("report")).models
    return changes


async def test_a_model_is_loaded_while_heartbeats_go_on(
    scheduler: ScriptedScheduler, executor: Executor
) -> None:
    attachment = await scheduler.welcomed()
    hello = attachment.hello
    assert hello.capacity.max_models == 1
    assert [(offer.card.name, offer.resident) for offer in hello.models] == [
        ("mock", True),
        ("other", False),
    ]
    assert hello.models[1].HasField("load_time")
    attachment.order(loads=[fleet.LoadModel(model="other", evict=["mock"])])
    (left,) = await until_changed(attachment, 1)
    assert (left.model, left.state) == ("mock", fleet.ModelChange.STATE_ABSENT)
    await attachment.next("heartbeat")
    await attachment.next("heartbeat")
    executor.engine.gate.release()
    (came,) = await until_changed(attachment, 1)
    assert (came.model, came.state) == ("other", fleet.ModelChange.STATE_RESIDENT)
    assert came.load_time.ToMilliseconds() == 1500
    one = grant("a", 1)
    one.request.model = "other"
    attachment.order(grants=[one])
    ended = await attachment.until_ended("a")
    assert ended.outcome == fleet.LeaseEnded.OUTCOME_COMPLETED


async def test_an_order_that_makes_no_sense_is_answered(
    scheduler: ScriptedScheduler, executor: Executor
) -> None:
    attachment = await scheduler.welcomed()
    attachment.order(loads=[fleet.LoadModel(model="other")])
    here, change = await until_changed(attachment, 2)
    assert (here.model, here.state) == ("mock", fleet.ModelChange.STATE_RESIDENT)
    assert change.state == fleet.ModelChange.STATE_FAILED
    assert change.failure.message == "max_models is 1, and too few models are evicted"
    one = grant("a", 1)
    one.request.model = "other"
    attachment.order(grants=[one])
    ended = await attachment.until_ended("a")
    assert ended.outcome == fleet.LeaseEnded.OUTCOME_RETURNED


async def test_a_load_goes_on_when_the_stream_breaks(
    scheduler: ScriptedScheduler, executor: Executor
) -> None:
    attachment = await scheduler.welcomed()
    attachment.order(loads=[fleet.LoadModel(model="other", evict=["mock"])])
    await until_changed(attachment, 1)
    attachment.close()
    again = await scheduler.welcomed()
    assert not any(offer.resident for offer in again.hello.models)
    assert [offer.loading for offer in again.hello.models] == [False, True]
    executor.engine.gate.release()
    (change,) = await until_changed(again, 1)
    assert (change.model, change.state) == ("other", fleet.ModelChange.STATE_RESIDENT)
