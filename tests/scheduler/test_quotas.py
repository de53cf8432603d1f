"""Quotas: pure ones with time as an argument, and at the scheduler's three doors."""

import asyncio
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import HeadwayError, from_rpc_error
from headway.reasons import Reason
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from scheduler_svc.core.messages import Request
from scheduler_svc.quotas import Quotas
from tests.scheduler.world import body, world


def make(max_keys: int = 100) -> Quotas:
    return Quotas(max_keys=max_keys, busy_retry_ms=700)


def request(name: str, *, tenant: str = "t", key: str = "", num_tokens: int = 10) -> Request:
    return Request(
        request_id=name,
        tenant=tenant,
        model="m",
        band=0,
        num_prompt_tokens=4,
        max_tokens=num_tokens - 4,
        num_samples=1,
        num_bytes=1,
        queue_timeout_ms=1,
        execution_timeout_ms=1,
        idempotency_key=key,
    )


def quota(key_id: str = "k", **limits: Any) -> generation.Quota:
    return generation.Quota(key_id=key_id, **limits)


def retry_ms(quotas: Quotas, asked: Request, limits: generation.Quota, now_ms: int) -> int:
    """The Retry-After of a refusal."""
    with pytest.raises(HeadwayError) as refused:
        quotas.admit(asked, limits, now_ms)
    assert refused.value.reason is Reason.QUOTA_EXCEEDED
    assert refused.value.retry_after_ms is not None
    return refused.value.retry_after_ms


def test_a_second_of_requests_at_once_and_then_one_by_one() -> None:
    quotas, limits = make(), quota(requests_per_s=4)
    for number in range(4):
        quotas.admit(request(str(number)), limits, 1_000)
    assert retry_ms(quotas, request("x"), limits, 1_000) == 250
    assert retry_ms(quotas, request("x"), limits, 1_249) == 1
    quotas.admit(request("x"), limits, 1_250)
    assert retry_ms(quotas, request("y"), limits, 1_250) == 250


def test_less_than_one_request_a_second() -> None:
    quotas, limits = make(), quota(requests_per_s=0.25)
    quotas.admit(request("a"), limits, 0)
    assert retry_ms(quotas, request("b"), limits, 0) == 4_000
    quotas.admit(request("b"), limits, 4_000)


@given(
    rate=st.floats(2**-6, 1_000, width=32),
    steps=st.lists(st.integers(0, 3_000), min_size=1, max_size=30),
)
def test_retry_after_is_exact(rate: float, steps: list[int]) -> None:
    quotas, limits, now_ms = make(), quota(requests_per_s=rate), 0
    for number, step in enumerate(steps):
        now_ms += step
        try:
            quotas.admit(request(str(number)), limits, now_ms)
        except HeadwayError as error:
            wait_ms = error.retry_after_ms or 0
            if wait_ms > 1:
                retry_ms(quotas, request("early"), limits, now_ms + wait_ms - 1)
            now_ms += wait_ms
            quotas.admit(request(str(number)), limits, now_ms)
        most = max(1.0, limits.requests_per_s) + limits.requests_per_s * now_ms / 1_000
        assert number + 1 <= most + 0.01


def test_tokens_are_charged_in_full_and_given_back_at_the_end() -> None:
    quotas, limits = make(), quota(tokens_per_minute=60)
    quotas.admit(request("a", num_tokens=50), limits, 0)
    # 50 + 20 - 60 = 10 tokens too many, one a second leaks
    assert retry_ms(quotas, request("b", num_tokens=20), limits, 0) == 10_000
    quotas.ended("a", 6)  # 4 of the prompt and 6 generated: 40 back
    quotas.admit(request("b", num_tokens=50), limits, 0)
    assert retry_ms(quotas, request("c", num_tokens=5), limits, 0) == 5_000


def test_what_can_never_fit_is_not_to_be_tried_again() -> None:
    with pytest.raises(HeadwayError) as refused:
        make().admit(request("a", num_tokens=61), quota(tokens_per_minute=60), 0)
    assert refused.value.reason is Reason.INVALID_REQUEST
    assert refused.value.retry_after_ms is None


def test_a_refusal_by_one_limit_charges_no_other() -> None:
    quotas = make()
    quotas.admit(request("a"), quota(max_inflight=1), 0)
    limits = quota(requests_per_s=1, tokens_per_minute=20, max_inflight=1)
    for _ in range(3):
        assert retry_ms(quotas, request("b"), limits, 0) == 700
    quotas.ended("a", 0)
    quotas.admit(request("b"), limits, 0)


def test_inflight_and_queued_are_counted_from_door_to_end() -> None:
    quotas = make()
    limits = quota(max_inflight=2, max_queued=1)
    quotas.admit(request("a"), limits, 0)
    assert retry_ms(quotas, request("b"), limits, 0) == 700
    quotas.granted("a")
    quotas.granted("a")  # again, after it went back to the queue
    quotas.admit(request("b"), limits, 0)
    quotas.granted("b")
    assert retry_ms(quotas, request("c"), limits, 0) == 700
    quotas.ended("b", 1)
    quotas.admit(request("c"), limits, 0)
    quotas.refused("c")
    quotas.admit(request("d"), limits, 0)
    quotas.ended("d", 0)  # cancelled before its grant
    quotas.admit(request("e"), limits, 0)


def test_what_the_core_refuses_is_not_charged() -> None:
    quotas, limits = make(), quota(requests_per_s=1, tokens_per_minute=10, max_inflight=1)
    for _ in range(5):
        quotas.admit(request("a"), limits, 0)
        quotas.refused("a")
    quotas.admit(request("b"), limits, 0)


def test_a_replay_of_a_live_request_is_free_and_only_that() -> None:
    quotas, limits = make(), quota(requests_per_s=1, max_inflight=1)
    quotas.admit(request("a", key="i"), limits, 0)
    quotas.admit(request("a2", key="i"), limits, 0)
    quotas.refused("a2")
    retry_ms(quotas, request("b", key="i2"), limits, 0)
    retry_ms(quotas, request("c"), limits, 0)
    quotas.admit(request("d", tenant="u", key="i"), limits, 0)
    quotas.ended("a", 1)
    assert retry_ms(quotas, request("e", key="i"), limits, 0) == 1_000


def test_keys_and_tenants_are_counted_apart_and_no_limits_cost_nothing() -> None:
    quotas = make()
    limits = quota(max_inflight=1)
    quotas.admit(request("a"), limits, 0)
    quotas.admit(request("b", tenant="u"), limits, 0)
    quotas.admit(request("c"), quota("other", max_inflight=1), 0)
    quotas.admit(request("d"), quota(), 0)
    assert len(quotas) == 3
    quotas.granted("d")
    quotas.ended("d", 1)


def test_the_limits_of_the_request_at_hand_count() -> None:
    quotas = make()
    quotas.admit(request("a"), quota(max_inflight=1), 0)
    quotas.admit(request("b"), quota(max_inflight=2), 0)
    retry_ms(quotas, request("c"), quota(max_inflight=2), 0)


def test_idle_keys_make_room_and_busy_ones_do_not() -> None:
    quotas = make(max_keys=2)
    once = {"requests_per_s": 2**-10}
    quotas.admit(request("a"), quota("a", **once), 0)
    quotas.ended("a", 0)
    quotas.admit(request("b"), quota("b", **once), 0)
    assert retry_ms(quotas, request("a2"), quota("a", **once), 0) == 1_024_000
    quotas.admit(request("c"), quota("c", **once), 0)  # in the place of a
    assert retry_ms(quotas, request("a3"), quota("a", **once), 0) == 700, "b and c are busy"
    quotas.ended("b", 0)
    quotas.admit(request("a4"), quota("a", **once), 0)
    assert len(quotas) == 2


# --- at the door ----------------------------------------------------------------------------


def limited(**fields: Any) -> generation.GenerationRequest:
    return body(quota=quota(max_inflight=1), **fields)


async def test_every_door_asks_the_quota_and_an_end_makes_room() -> None:
    async with world(retry_after_min_ms=1_234) as own:
        executor, client = await own.pair()
        await client.submit(request=limited())
        await client.accepted()
        grant = await executor.grant()
        assert not grant.request.HasField("quota")
        await client.submit(handle=1, request=limited())
        failure = (await client.rejected()).failure
        assert failure.reason == "QUOTA_EXCEEDED"
        assert failure.retry_after.ToMilliseconds() == 1_234
        stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
        with pytest.raises(grpc.aio.AioRpcError) as submitted:
            await stub.Submit(scheduler.SubmitRequest(request=limited()))
        assert from_rpc_error(submitted.value).reason is Reason.QUOTA_EXCEEDED
        with pytest.raises(grpc.aio.AioRpcError) as generated:
            async for _ in stub.Generate(scheduler.GenerateRequest(request=limited())):
                pass
        assert from_rpc_error(generated.value).retry_after_ms == 1_234
        await executor.run(grant, [1, 2, 3, 4])
        await client.finished()
        await stub.Submit(scheduler.SubmitRequest(request=limited()))


async def test_a_replay_finds_its_request_whatever_the_quota() -> None:
    async with world() as own:
        client = own.client()
        await own.executor().attach()
        stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
        first = await stub.Submit(scheduler.SubmitRequest(request=limited(idempotency_key="i")))
        again = limited(idempotency_key="i")
        again.quota.max_inflight = 7
        again.quota.key_id = "changed"
        second = await stub.Submit(scheduler.SubmitRequest(request=again))
        assert second.request_id == first.request_id
        await client.open()
        await client.submit(request=limited(idempotency_key="other"))
        assert (await client.rejected()).failure.reason == "QUOTA_EXCEEDED"


async def test_a_request_that_leaves_the_queue_makes_room_in_it() -> None:
    async with world() as own:
        executor, client = own.executor(), own.client()
        await client.open()
        await executor.attach(num_slots=1)
        asked = body(quota=quota(max_queued=1))
        await client.submit(handle=0, request=asked)
        await client.accepted()
        await executor.grant()
        await client.submit(handle=1, request=asked)
        await client.accepted()
        await client.submit(handle=2, request=asked)
        assert (await client.rejected()).failure.reason == "QUOTA_EXCEEDED"
        await client.command(cancels=[scheduler.CancelCommand(handle=1)])
        await client.finished()
        await client.submit(handle=3, request=asked)
        await asyncio.wait_for(client.accepted(), 60)
