"""The scheduler with real executors, whose mock engine says what its formulas say."""

import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

from executor_svc.core.engine import LeaseRequest, PromptScoring, SamplingParams
from executor_svc.mock_formulas import mock_scores, mock_tokens, mock_top
from headway.v1 import generation_pb2 as generation
from headway.v1 import scheduler_pb2 as scheduler
from headway.v1 import scheduler_pb2_grpc
from tests.executor.linked import VOCAB, Executor
from tests.scheduler.world import World, body, world

PROMPT = [10, 20, 30, 40]
SCORING = generation.PromptScoring(
    logprobs=True,
    top_logprobs=3,
    last_n=2,
    target_offsets=[0, 2, 2, 3],
    target_token_ids=[5, 6, 7],
    num_alternatives=2,
)


@contextlib.asynccontextmanager
async def fleet(num_executors: int = 1) -> AsyncIterator[tuple[World, list[Executor]]]:
    async with world(executor_grace_ms=0) as own:
        address = f"127.0.0.1:{own.process.port}"
        executors = [Executor(address, executor_id=f"e{number}") for number in range(num_executors)]
        try:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
            while not (await stub.ListModels(scheduler.ListModelsRequest())).models:
                pass
            yield own, executors
        finally:
            for executor in executors:
                await executor.close()


def asked(num_tokens: int, **fields: Any) -> generation.GenerationRequest:
    sampling = {"max_tokens": num_tokens, "seed": 3, "logprobs": True, "top_logprobs": 2}
    values: dict[str, Any] = {"model": "mock", "prompt_token_ids": PROMPT, "sampling": sampling}
    return body(**(values | fields))


async def finished(own: World, request: generation.GenerationRequest) -> Any:
    """The result of one request."""
    stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
    submitted = await stub.Submit(scheduler.SubmitRequest(request=request))
    ask = scheduler.RetrieveRequest(request_id=submitted.request_id, tenant="t")
    ask.wait.FromSeconds(30)
    return (await stub.Retrieve(ask)).result


def check_samples(result: Any, num_tokens: int) -> None:
    for number, sample in enumerate(result.samples):
        tokens = mock_tokens(
            PROMPT, seed=3, sample=number, start=0, stop=num_tokens, vocab_size=VOCAB
        )
        assert list(sample.token_ids) == tokens
        tops = [mock_top(token, 2, VOCAB) for token in tokens]
        assert list(sample.top_token_ids) == [token for ids, _ in tops for token in ids]
        assert list(sample.top_logprobs) == [value for _, values in tops for value in values]


async def test_all_that_can_be_asked_for_comes_back() -> None:
    async with fleet() as (own, _):
        request = asked(5, num_samples=2, prompt_scoring=SCORING)
        result = await finished(own, request)
        check_samples(result, 5)
        expected = mock_scores(
            LeaseRequest(0, "mock", PROMPT, SamplingParams(max_tokens=5, seed=3)),
            PromptScoring(True, 3, 2, [0, 2, 2, 3], [5, 6, 7], 2),
            VOCAB,
        )
        got = result.prompt_scores
        for name in (
            "top_token_id",
            "top_logprob",
            "target_logprob",
            "alternative_token_id",
            "alternative_logprob",
        ):
            assert list(getattr(got, name)) == list(getattr(expected, name)), name
        assert list(got.logprob)[2:] == list(expected.logprob)[2:]
        assert all(map(math.isnan, got.logprob[:2]))
        assert result.usage.num_cached_prompt_tokens == 0
        assert result.timing.executor_id == "e0"
        again = await finished(own, request)
        assert again.usage.num_cached_prompt_tokens == len(PROMPT) - 1


async def test_a_grammar_is_refused_by_an_engine_without_a_tokenizer() -> None:
    async with fleet() as (own, _):
        grammar = generation.Grammar(regex="a+")
        result = await finished(own, asked(5, sampling={"max_tokens": 5, "grammar": grammar}))
        assert result.failure.reason == "INVALID_REQUEST"
        assert "grammar" in result.failure.message


async def test_alternatives_and_scores_survive_an_executor_that_is_gone() -> None:
    async with fleet(2) as (own, executors):
        stub = scheduler_pb2_grpc.SchedulerServiceStub(own.channel)
        num_tokens = 2_000
        call = stub.Generate(
            scheduler.GenerateRequest(request=asked(num_tokens, prompt_scoring=SCORING))
        )
        frames, timing, request_id = generation.StepFrame(), None, ""
        async for message in call:
            request_id = message.accepted.request_id or request_id
            frames.MergeFrom(message.frame)
            if len(executors) == 2 and len(frames.handle) > 20:
                (running,) = [e for e in executors if e.session.heartbeat().handles]
                executors.remove(running)
                await running.close()
            if message.HasField("finished"):
                timing = message.finished.timing
        assert timing is not None
        assert timing.num_attempts > 1
        assert not timing.inexact
        assert list(frames.index) == list(range(num_tokens))
        assert len(frames.prompt_scores) == 1
        assert len(frames.top_token_id) == 2 * num_tokens
        ask = scheduler.RetrieveRequest(request_id=request_id, tenant="t")
        check_samples((await stub.Retrieve(ask)).result, num_tokens)
