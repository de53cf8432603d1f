"""Text workers: what they do, what they survive, and that nobody waits for a poisonous text."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog

from gateway_http.model_text import Text
from gateway_http.settings import GatewaySettings
from gateway_http.text import Chat
from gateway_http.text_pool import TextPool
from headway.errors import HeadwayError
from headway.reasons import Reason
from tests.gateway import tiny_model

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = (
    "{% set ns = namespace(s='a') %}"
    "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
)
CHAT = Chat(messages=[{"role": "user", "content": "Hi"}])
# Poisonous only for those who say so: other chats may be in need of the same template.
PICKY = "{% if messages[0].content == 'poison' %}" + ENDLESS + "{% endif %}" + tiny_model.TEMPLATE


@contextlib.asynccontextmanager
async def loaded(template: str = tiny_model.TEMPLATE, **changes: Any) -> AsyncIterator[Text]:
    settings = GatewaySettings(**{"num_text_workers": 1, "text_timeout_s": 60, **changes})
    pool = TextPool(settings)
    assets = tiny_model.assets()
    assets.chat_template = template
    card = tiny_model.card()
    card.max_context_tokens = 1 << 20
    try:
        yield Text(card, await pool.load(card, assets), pool)
    finally:
        pool.close()


def chat(content: str) -> Chat:
    return Chat(messages=[{"role": "user", "content": content}])


async def refusal(text: Text, one: Chat) -> HeadwayError:
    with pytest.raises(HeadwayError) as caught:
        await text.render_chat(one, "messages")
    return caught.value


async def test_workers_say_what_the_gateway_would() -> None:
    words = "the queue 世界 " * 2000
    async with loaded(num_text_workers=2) as text, loaded(num_text_workers=0) as own:
        token_ids = await text.encode(words, "prompt")
        assert token_ids == await own.encode(words, "prompt")
        assert await text.decode(token_ids, "tokens") == words
        assert await own.decode(token_ids, "tokens") == words
        for one in (CHAT, chat(words)):
            rendered = await own.render_chat(one, "messages")
            assert await text.render_chat(one, "messages") == rendered


async def test_a_quick_template_is_rendered_here_from_its_second_time_on() -> None:
    async with loaded() as text:
        assert not text._is_template_quick
        first = await text.render_chat(CHAT, "messages")
        assert text._is_template_quick
        text._pool.close()  # nobody is there to be asked any more
        assert await text.render_chat(CHAT, "messages") == first


async def test_only_small_chats_are_rendered_here() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": list(range(9999))}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert CHAT.is_small(100)
    for large in (
        Chat(messages=[message]),
        Chat(messages=CHAT.messages, tools=[call]),
        Chat(messages=[{"role": "assistant", "content": "", "reasoning_content": "x" * 100}]),
        Chat(messages=CHAT.messages * 10),
    ):
        assert not large.is_small(100)


async def test_an_endless_template_ends_with_its_worker_and_the_next_one_works() -> None:
    async with loaded(PICKY, text_timeout_s=2) as text:
        for _ in range(2):
            with structlog.testing.capture_logs() as logs:
                error = await refusal(text, chat("poison"))
            assert error.reason is Reason.INVALID_REQUEST
            assert "more time or memory" in error.message
            assert error.field == "messages"
            assert [line["event"] for line in logs] == ["text_worker.lost"]
            assert "Hi" in await text.render_chat(chat("Hi" * 1000), "messages")


async def test_nobody_else_waits_for_a_poisonous_template() -> None:
    async with loaded(PICKY, num_text_workers=2) as text:
        ended = []

        async def render(one: Chat) -> None:
            with contextlib.suppress(HeadwayError):
                await text.render_chat(one, "messages")
            ended.append(one.messages[0]["content"][:6])

        async def poison() -> None:
            await render(chat("poison"))

        task = asyncio.create_task(poison())
        await render(CHAT)
        await render(chat("medium" * 1000))
        assert await text.encode("short", "prompt")
        text._pool.close()  # or the poison would take a minute
        await task
        assert ended == ["Hi", "medium", "poison"]


async def test_a_template_that_takes_all_memory_gets_none() -> None:
    limit = 256 << 20
    async with loaded(HUGE, max_text_worker_bytes=limit) as text:
        error = await refusal(text, CHAT)
        assert error.reason is Reason.INVALID_REQUEST


async def test_a_text_that_takes_too_long_is_refused() -> None:
    async with loaded(text_timeout_s=1) as text:
        with pytest.raises(HeadwayError, match="more time or memory"):
            await text.encode("the queue in front " * 500_000, "prompt")
        assert await text.encode("the queue " * 300, "prompt")


async def test_a_worker_that_was_killed_is_started_again() -> None:
    async with loaded() as text:
        words = "the queue " * 300
        before = await text.encode(words, "prompt")
        process = text._pool._workers[0]._process
        assert process is not None
        process.kill()
        process.wait()
        assert await text.encode(words, "prompt") == before


async def test_a_template_is_refused_in_its_own_words_from_a_worker() -> None:
    async with loaded("{{ raise_exception('only two turns') }}") as text:
        assert "only two turns" in (await refusal(text, CHAT)).message


async def test_closing_ends_whoever_waits() -> None:
    async with loaded(ENDLESS) as text:
        task = asyncio.create_task(refusal(text, CHAT))
        await asyncio.wait([task], timeout=0)
        text._pool.close()
        assert (await task).reason is Reason.DRAINING
