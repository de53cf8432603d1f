"""Alternatives, scores, cached tokens and exactness through a scheduler over real gRPC."""

import math
from typing import Any

import pytest
from structlog.testing import capture_logs

from headway.v1 import fleet_pb2 as fleet
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from tests.scheduler.world import CARD, LENGTH, Client, Executor, body, granted, held_lease, world

RICH: dict[str, Any] = {"sampling": {"max_tokens": 2, "logprobs": True, "top_logprobs": 2}}
SCORED: dict[str, Any] = {
    "prompt_scoring": generation.PromptScoring(logprobs=True, num_alternatives=1)
}


def top(*tokens: int) -> dict[str, Any]:
    """Arrays beside these tokens of a frame."""
    return {
        "logprob": [-0.5] * len(tokens),
        "num_top": [2] * len(tokens),
        "top_token_id": [t + n for t in tokens for n in (0, 1)],
        "top_logprob": [-0.5, -1.5] * len(tokens),
    }


def answer(handle: int) -> generation.PromptScores:
    """To SCORED, for the prompt of world.body."""
    return generation.PromptScores(
        handle=handle,
        logprob=[math.nan, -1, -2],
        alternative_token_id=[8, 9],
        alternative_logprob=[-3, -4],
    )


async def send_scores(executor: Executor, handle: int) -> None:
    frame = generation.StepFrame(prompt_scores=[answer(handle)])
    await executor.send(report=fleet.ExecutorReport(frame=frame))


async def scores_of(client: Client) -> generation.PromptScores:
    while True:
        updates = await client.updates()
        if updates.frame.prompt_scores:
            assert not client.tokens, "they come before the first token"
            return updates.frame.prompt_scores[0]


async def retrieved(client: Client, grant: fleet.Grant) -> generation.GenerationResult:
    request = scheduler.RetrieveRequest(request_id=grant.lease.request_id, tenant="t")
    result: generation.GenerationResult = (await client.stub.Retrieve(request)).result
    return result


async def test_alternatives_travel_and_go_along_to_the_next_executor() -> None:
    async with world(executor_grace_ms=0) as own:
        first, client = await own.pair()
        second = own.executor("e2")
        grant = await granted(first, client, **RICH)
        assert grant.request.sampling.top_logprobs == 2
        await first.tokens(grant.handle, [5], **top(5))
        await client.until_token(1)
        first.call.cancel()
        await second.attach()
        again = await second.grant()
        (generated,) = again.generated
        assert list(generated.top_token_ids) == [5, 6]
        assert list(generated.top_logprobs) == [-0.5, -1.5]
        await second.tokens(again.handle, [7], start=1, end=True, **top(7))
        await second.end(again.lease, [2])
        await client.finished()
        (sample,) = (await retrieved(client, grant)).samples
        assert list(sample.top_token_ids) == [5, 6, 7, 8]


async def test_scores_reach_followers_result_and_generate() -> None:
    async with world() as own:
        executor, client = await own.pair()
        late = own.client()
        grant = await granted(executor, client, **SCORED)
        assert grant.request.prompt_scoring == SCORED["prompt_scoring"]
        assert not grant.has_prompt_scores
        await send_scores(executor, grant.handle)
        got = await scores_of(client)
        assert (got.handle, list(got.alternative_token_id)) == (0, [8, 9])
        await executor.run(grant, [1, 2, 3, 4])
        await client.finished()
        result = await retrieved(client, grant)
        assert result.prompt_scores.handle == 0
        assert list(result.prompt_scores.logprob)[1:] == [-1, -2]
        await late.open()
        await late.resume(3, grant.lease.request_id, [4])
        while not (updates := await late.updates()).frame.prompt_scores:
            pass
        assert updates.frame.prompt_scores[0].handle == 3
        stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
        call = stub.Generate(scheduler.GenerateRequest(request=body(**SCORED)))
        grant = await executor.grant()
        await send_scores(executor, grant.handle)
        await executor.run(grant, [1, 2, 3, 4])
        messages = [message async for message in call]
        assert messages[-1].HasField("finished")
        handles = [scores.handle for m in messages for scores in m.frame.prompt_scores]
        assert handles == [0]


async def test_whoever_takes_over_is_told_whether_scores_are_there() -> None:
    async with world(executor_grace_ms=60_000) as own:
        executor, client = await own.pair()
        grant = await granted(executor, client, **SCORED)
        lease = grant.lease
        for has_scores in (False, True):
            executor.call.cancel()
            held = held_lease(lease, [0])
            (adopt,) = (await executor.attach(leases=[held])).adopts
            assert adopt.has_prompt_scores is has_scores
            lease = adopt.lease
            if not has_scores:
                await send_scores(executor, adopt.handle)
                await scores_of(client)
        await executor.end(lease, outcome=fleet.LeaseEnded.OUTCOME_RETURNED)
        again = await executor.grant()
        assert again.has_prompt_scores
        await executor.run(again, [1, 2, 3, 4])
        assert not (await client.finished()).HasField("failure")


async def test_a_completion_without_the_scores_is_a_logged_failure() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client, **SCORED)
        end = generation.SequenceEnd(handle=grant.handle, num_tokens=0, reason=LENGTH)
        report = fleet.ExecutorReport(frame=generation.StepFrame(ends=[end]))
        with capture_logs() as logs:
            await executor.send(report=report)
            await executor.end(grant.lease, [0])
            finished = await client.finished()
        assert finished.failure.reason == "INTERNAL"
        (fault,) = [log for log in logs if log["event"] == "lease.faulted"]
        assert "scores" in fault["message"]


async def test_cached_tokens_and_the_executor_are_in_finished_result_and_log() -> None:
    async with world() as own:
        executor, client = await own.pair("gpu-7")
        grant = await granted(executor, client)
        await executor.tokens(grant.handle, [1, 2, 3, 4], end=True)
        with capture_logs() as logs:
            await executor.end(grant.lease, [4], num_cached_prompt_tokens=2)
            finished = await client.finished()
        assert finished.usage.num_cached_prompt_tokens == 2
        assert finished.timing.executor_id == "gpu-7"
        assert not finished.timing.inexact
        result = await retrieved(client, grant)
        assert result.usage == finished.usage
        assert result.timing == finished.timing
        (line,) = [log for log in logs if log["event"] == "request.finished"]
        assert (line["executor_id"], line["num_cached_prompt_tokens"]) == ("gpu-7", 2)
        fairness = own.process.runtime._core._state.queue.fairness
        assert fairness.key((1, "tiny"), "t") == (3 - 2) + 2 * 4, "the cached ones cost nothing"


async def test_an_executor_cannot_claim_more_cached_tokens_than_there_are() -> None:
    async with world() as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await executor.tokens(grant.handle, [1, 2, 3, 4], end=True)
        await executor.end(grant.lease, [4], num_cached_prompt_tokens=999)
        assert (await client.finished()).usage.num_cached_prompt_tokens == 3


async def test_a_request_that_nobody_ran_has_no_executor() -> None:
    async with world() as own:
        _, client = await own.pair(num_slots=0)
        await client.submit()
        await client.accepted()
        await client.command(cancels=[scheduler.CancelCommand(handle=0)])
        assert (await client.finished()).timing.executor_id == ""


@pytest.mark.parametrize(
    ("first_class", "second_class", "num_tokens", "is_inexact"),
    [
        ("x", "x", 1, False),
        ("x", "y", 1, True),
        ("x", "", 1, True),
        ("", "", 1, True),
        ("x", "y", 0, False),
        ("", "", 0, False),
    ],
)
async def test_going_on_in_another_exactness_class_is_said(
    first_class: str, second_class: str, num_tokens: int, *, is_inexact: bool
) -> None:
    async with world(executor_grace_ms=0) as own:
        first, client = await own.pair(exactness_class=first_class)
        second = own.executor("e2")
        grant = await granted(first, client)
        if num_tokens:
            await first.tokens(grant.handle, [1])
            await client.until_token(1)
        first.call.cancel()
        await second.attach(exactness_class=second_class)
        again = await second.grant()
        await second.tokens(again.handle, [1, 2, 3, 4][num_tokens:], start=num_tokens, end=True)
        await second.end(again.lease, [4])
        timing = (await client.finished()).timing
        assert (timing.inexact, timing.executor_id) == (is_inexact, "e2")


async def test_a_class_that_a_load_proved_counts() -> None:
    """It takes a load to prove it, so hello cannot know the class of a model that is absent."""
    async with world(executor_grace_ms=0) as own:
        first, client = await own.pair(exactness_class="x")
        second = own.executor("e2")
        grant = await granted(first, client)
        await first.tokens(grant.handle, [1])
        await client.until_token(1)
        first.call.cancel()
        await second.attach(models=(), absent=(CARD,))
        while not (await second.read()).orders.loads:
            pass
        change = fleet.ModelChange(
            model=CARD.name, state=fleet.ModelChange.STATE_RESIDENT, exactness_class="x"
        )
        await second.send(report=fleet.ExecutorReport(models=[change]))
        again = await second.grant()
        await second.tokens(again.handle, [2, 3, 4], start=1, end=True)
        await second.end(again.lease, [4])
        assert not (await client.finished()).timing.inexact


async def test_an_adopted_lease_is_as_exact_as_before() -> None:
    async with world(executor_grace_ms=60_000) as own:
        executor, client = await own.pair()
        grant = await granted(executor, client)
        await executor.tokens(grant.handle, [1])
        await client.until_token(1)
        executor.call.cancel()
        held = held_lease(grant.lease, [1])
        (adopt,) = (await executor.attach(leases=[held])).adopts
        await executor.tokens(adopt.handle, [2, 3, 4], start=1, end=True)
        await executor.end(adopt.lease, [4])
        assert not (await client.finished()).timing.inexact


async def test_a_class_is_a_name() -> None:
    async with world() as own:
        executor = own.executor()
        with pytest.raises(Exception, match="exactness_class"):
            await executor.attach(exactness_class="a\nb", models=[CARD])
