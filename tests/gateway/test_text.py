"""Tokens to text in any chunks, stop strings, templates."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway_http.detokenize import MAX_UNSETTLED_TOKENS, Detokenizer, StopTrimmer
from gateway_http.settings import GatewaySettings
from gateway_http.text import Text, TextPool
from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2
from tests.gateway import tiny_model


def detokenizer() -> Detokenizer:
    return Detokenizer(tiny_model.tokenizer().decode, {tiny_model.eos_id()})


def stream(token_ids: list[int]) -> str:
    one = detokenizer()
    return "".join(map(one.push, token_ids)) + one.flush()


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back_token_by_token(text: str) -> None:
    assert stream(tiny_model.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, tiny_model.tokenizer().get_vocab_size() - 1), max_size=80))
def test_any_tokens_give_the_text_of_the_whole(token_ids: list[int]) -> None:
    whole = tiny_model.tokenizer().decode(token_ids, skip_special_tokens=True)
    assert stream(token_ids) == whole


def test_a_long_run_of_broken_bytes_is_settled_in_time() -> None:
    rng = random.Random(7)
    vocab = tiny_model.tokenizer().get_vocab()
    high = [token_id for token, token_id in vocab.items() if len(token) == 1 and ord(token) > 127]
    token_ids = [rng.choice(high) for _ in range(2000)]
    one = detokenizer()
    pieces = [one.push(token_id) for token_id in token_ids]
    assert len(one._window) <= 3 * MAX_UNSETTLED_TOKENS
    assert "".join(pieces) + one.flush() == tiny_model.tokenizer().decode(token_ids)


def test_no_piece_ever_holds_half_a_character() -> None:
    one = detokenizer()
    pieces = [one.push(token_id) for token_id in tiny_model.encode("🙂世界")]
    assert "".join(pieces) == "🙂世界"
    assert all("\ufffd" not in piece for piece in pieces)
    assert "" in pieces


def test_a_decoder_that_strips_the_first_space_keeps_the_others() -> None:
    words = ["▁one", "▁two", "▁three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    one = Detokenizer(tokenizer.decode, ())
    assert [one.push(token_id) for token_id in (0, 1, 2)] == ["one", " two", " three"]


def test_the_first_space_of_an_answer_is_its_own() -> None:
    words = ["▁one", "▁two", "▁three", "<s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.decoder = decoders.Metaspace()
    for prompt, expected in (([0], " two"), ([0, 3], " two"), ([], "two"), ([3], "two")):
        assert Detokenizer(tokenizer.decode, {3}, prompt).push(1) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text())
def test_a_prompt_changes_no_answer_of_a_byte_level_model(prompt: str, text: str) -> None:
    one = Detokenizer(
        tiny_model.tokenizer().decode, {tiny_model.eos_id()}, tiny_model.encode(prompt)
    )
    pieces = [one.push(token_id) for token_id in tiny_model.encode(text)]
    assert "".join(pieces) + one.flush() == text


def test_a_prompt_may_end_within_a_character() -> None:
    token_ids = tiny_model.encode("ab🙂")
    one = Detokenizer(tiny_model.tokenizer().decode, (), token_ids[:-1])
    pieces = [one.push(token_id) for token_id in [*token_ids[-1:], *tiny_model.encode(" ok")]]
    assert "".join(pieces).endswith(" ok")


def test_an_unfinished_character_is_told_at_the_end() -> None:
    assert stream(tiny_model.encode("ab🙂")[:-1]).startswith("ab")
    assert stream(tiny_model.encode("ab🙂")[:-1]).endswith("\ufffd")


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_trimmed_text_is_the_text_without_the_stop(text: str, stops: list[str]) -> None:
    """One character a token; the executor's rule: the stop that completes first ends it."""
    matches = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    trimmer = StopTrimmer(stops)
    if not matches:
        out = "".join(map(trimmer.push, text)) + trimmer.finish("", None)
        assert out == text
        return
    num_read, stop = min(matches)
    out = "".join(map(trimmer.push, text[:num_read])) + trimmer.finish("", stop)
    assert out == text[: num_read - len(stop)]


def test_what_may_become_a_stop_is_held_back_and_let_go() -> None:
    trimmer = StopTrimmer(["END"])
    assert [trimmer.push(piece) for piece in ("a E", "N", "x", "EN")] == ["a ", "", "ENx", ""]
    assert trimmer.finish("", None) == "EN"


def test_a_match_before_min_tokens_is_no_stop() -> None:
    trimmer = StopTrimmer(["END"])
    assert [trimmer.push(piece) for piece in ("an END", " of it", " END")] == [
        "an ",
        "END of it",
        " ",
    ]
    assert trimmer.finish("", "END") == ""


async def loaded(
    template: str = tiny_model.TEMPLATE, name: str = tiny_model.NAME, **changes: object
) -> Text:
    pool = TextPool(GatewaySettings(**changes))
    assets = tiny_model.assets(name)
    if name == tiny_model.NAME:
        assets.chat_template = template
    return await pool.load(tiny_model.card(name), assets)


MESSAGES = [{"role": "user", "content": "Hi"}]


async def test_a_chat_becomes_tokens() -> None:
    text = await loaded()
    token_ids = await text.encode_chat(MESSAGES, "messages")
    written = tiny_model.tokenizer().decode(token_ids, skip_special_tokens=False)
    assert written == "<|user|>Hi<|end|>\n<|assistant|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ eos_token }}{{ strftime_now('%%') }}", "<|end|>%"),
        ("{% for m in messages %}{% generation %}x{% endgeneration %}{% break %}{% endfor %}", "x"),
    ],
)
async def test_templates_have_the_names_they_expect(template: str, expected: str) -> None:
    text = await loaded(template)
    token_ids = await text.encode_chat(MESSAGES, "messages")
    assert tiny_model.tokenizer().decode(token_ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only two turns') }}", "only two turns"),
        ("{{ messages.append(1) }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}{{ x.__globals__.y }}", "does not take these messages"),
        ("{{ messages[0] + 1 }}", "does not take these messages"),
    ],
)
async def test_templates_that_refuse_or_misbehave(template: str, message: str) -> None:
    text = await loaded(template)
    with pytest.raises(HeadwayError, match=message) as caught:
        await text.encode_chat(MESSAGES, "messages")
    assert caught.value.reason is Reason.INVALID_REQUEST


async def test_output_of_a_template_is_bounded() -> None:
    text = await loaded("{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}")
    with pytest.raises(HeadwayError) as caught:
        await text.encode_chat(MESSAGES, "messages")
    assert caught.value.reason is Reason.PROMPT_TOO_LONG
    text = await loaded("{% for i in range(9999) %}{{ i }}{% endfor %}", max_rendered_chars=10)
    with pytest.raises(HeadwayError) as caught:
        await text.encode_chat(MESSAGES, "messages")
    assert caught.value.reason is Reason.PROMPT_TOO_LONG


async def test_a_model_without_files_refuses_text_and_chats() -> None:
    text = await loaded(name=tiny_model.BARE_NAME)
    assert not text.has_tokenizer
    for call in (text.encode("x", "prompt"), text.encode_chat(MESSAGES, "messages")):
        with pytest.raises(HeadwayError, match="no tokenizer"):
            await call
    no_template = await loaded("")
    with pytest.raises(HeadwayError, match="no chat template"):
        await no_template.encode_chat(MESSAGES, "messages")


async def test_unreadable_files_leave_token_ids_usable() -> None:
    pool = TextPool(GatewaySettings())
    assets = generation_pb2.ModelAssets(
        tokenizer_json=b"{", tokenizer_config_json=b"[", chat_template="{% if %}"
    )
    assert not (await pool.load(tiny_model.card(), assets)).has_tokenizer


async def test_waiting_texts_are_bounded() -> None:
    text = await loaded(max_text_jobs=1, inline_text_chars=1, num_text_threads=1)
    results = await asyncio.gather(
        text.encode("some text", "prompt"), text.encode("more", "prompt"), return_exceptions=True
    )
    assert isinstance(results[0], list)
    assert isinstance(results[1], HeadwayError)
    assert results[1].reason is Reason.NO_CAPACITY
