"""Chat templates and tokenizers of a model, and texts that are bounded."""

import asyncio

import pytest

from gateway_http.model_text import Text
from gateway_http.settings import GatewaySettings
from gateway_http.text import Chat, opens_thought
from gateway_http.text_pool import TextPool
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model
from tests.gateway.texts import MESSAGES, loaded, render


async def test_a_chat_becomes_text_and_tokens() -> None:
    text = await loaded()
    rendered = await render(text)
    assert rendered == "<|user|>Hi<|end|>\n<|assistant|>"
    token_ids = await text.encode(rendered, "messages", False)
    assert await text.decode(token_ids, "tokens") == rendered
    assert len(token_ids) == 6


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ {'b': '<ü>', 'a': 1} | tojson }}", '{"b": "<ü>", "a": 1}'),
        ("{{ [1, {}] | tojson(indent=1) }}", "[\n 1,\n {}\n]"),
        ("{{ eos_token }}{{ strftime_now('%%') }}", "<|end|>%"),
        ("{% for m in messages %}{% generation %}x{% endgeneration %}{% break %}{% endfor %}", "x"),
        ("{% for i in range(4) %}{% if i % 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{{ tools is none }}{{ documents is none }}{{ no_such is defined }}", "TrueTrueFalse"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ],
)
async def test_templates_have_the_names_they_expect(template: str, expected: str) -> None:
    assert await render(await loaded(template)) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only two turns') }}", "only two turns"),
        ("{{ messages.append(1) }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}{{ x.__globals__.y }}", "does not take these messages"),
        ("{{ messages[0] + 1 }}", "does not take these messages"),
        ("{{ 1 / 0 }}", "does not take these messages"),
        ("{% include 'file' %}", "does not take these messages"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "does not take these messages"),
    ],
)
async def test_templates_that_refuse_or_misbehave(template: str, message: str) -> None:
    with pytest.raises(HeadwayError, match=message) as caught:
        await render(await loaded(template))
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.field == "messages"


async def test_constants_of_a_template_are_not_worked_out_when_it_is_read() -> None:
    """Or "a" times ten billion would take the memory of whoever loads the model."""
    await loaded("{% if no_such %}{{ 'a' * 10000000000000 }}{% endif %}")


async def test_output_of_a_template_is_bounded() -> None:
    wild = "{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}"
    for template in (wild, "{% for i in range(9999) %}{{ i }}{% endfor %}"):
        with pytest.raises(HeadwayError) as caught:
            await render(await loaded(template, max_rendered_chars=10_000))
        assert caught.value.reason is Reason.PROMPT_TOO_LONG


async def test_a_final_message_goes_on() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    chat = Chat(messages=messages, continues_final_message=True, has_generation_prompt=False)
    assert await render(await loaded(), chat) == "<|user|>Hi<|end|>\n<|assistant|>Well, "
    with pytest.raises(HeadwayError, match="leaves out the final message"):
        await render(await loaded("{{ messages[0].content }}"), chat)


async def test_a_thought_that_the_template_opens_can_be_closed() -> None:
    text = await loaded(tiny_model.TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think>\n{%"))
    assert opens_thought(await render(text))
    at_once = Chat(messages=MESSAGES, answers_at_once=True, answer_start="<tool_call>")
    assert (await render(text, at_once)).endswith("<think>\n\n</think>\n\n<tool_call>")
    assert (await render(await loaded(), at_once)).endswith("<|assistant|><tool_call>")


async def test_variables_of_a_template_hide_none_of_ours() -> None:
    chat = Chat(messages=MESSAGES, names={"x": 1, "eos_token": "no", "messages": []})
    text = await loaded("{{ x }}{{ eos_token }}{{ messages | length }}")
    assert await render(text, chat) == "1<|end|>1"


async def test_a_model_without_files_refuses_text_and_chats() -> None:
    text = await loaded(name=tiny_model.BARE_NAME)
    assert not text.has_tokenizer
    for call in (text.encode("x", "prompt"), render(text)):
        with pytest.raises(HeadwayError, match="no tokenizer"):
            await call
    with pytest.raises(HeadwayError, match="no chat template"):
        await render(await loaded(""))


async def test_unreadable_files_leave_token_ids_usable() -> None:
    assets = generation_pb2.ModelAssets(
        tokenizer_json=b"{", tokenizer_config_json=b"[", chat_template="{% if %}"
    )
    pool = TextPool(GatewaySettings(num_text_workers=0))
    files = await pool.load(tiny_model.card(), assets)
    assert not Text(tiny_model.card(), files, pool).has_tokenizer


async def test_waiting_texts_are_bounded() -> None:
    text = await loaded(max_text_jobs=1, inline_text_chars=1)
    results = await asyncio.gather(
        text.encode("some text", "prompt"), text.encode("more", "prompt"), return_exceptions=True
    )
    assert isinstance(results[0], list)
    assert isinstance(results[1], HeadwayError)
    assert results[1].reason is Reason.NO_CAPACITY


async def test_bytes_of_tokens_that_are_part_of_a_character() -> None:
    text = await loaded()
    token_ids = tiny_model.encode("a🙂ü")
    data = b"".join(text.token_bytes(token_id) or b"" for token_id in token_ids)
    assert data == "a🙂ü".encode()
    assert any("\ufffd" in text.token_text(token_id) for token_id in token_ids)
