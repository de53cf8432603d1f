"""Text that settles token by token, for three kinds of tokenizers, and stop strings in it."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gateway_http.detokenize import MAX_UNSETTLED_TOKENS, Detokenizer, StopTrimmer
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


CORPUS = ["the queue in front of the fleet, grüße 世界 ok 🙂 low lower lowest", "a b  c   d"] * 8


def llama2_style() -> Tokenizer:
    """SentencePiece BPE: Metaspace, byte fallback, the first space stripped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=specials, show_progress=False, limit_alphabet=40
    )
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    # trained as special tokens, bytes would be left out of texts
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [one for one in data["added_tokens"] if one["id"] < 3]
    return Tokenizer.from_str(json.dumps(data))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


TOKENIZERS = {
    "byte-level": tiny_model.tokenizer(),
    "llama2": llama2_style(),
    "unigram": unigram(),
    "wordpiece": word_piece(),
}


def special_ids(tokenizer: Tokenizer) -> set[int]:
    added = tokenizer.get_added_tokens_decoder()
    return {token_id for token_id, token in added.items() if token.special}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokenizer_add_up_to_one_decode(name: str, data: st.DataObject) -> None:
    """ByteFallback takes back all characters of a run of bytes if its last one is wrong, which no
    stream can do: such tokens come from whole characters here."""
    tokenizer = TOKENIZERS[name]
    ids = st.integers(0, tokenizer.get_vocab_size() - 1).filter(
        lambda token_id: not str(tokenizer.id_to_token(token_id)).startswith("<0x")
    )
    text_ids = st.text().map(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    token_ids = data.draw(st.lists(ids, max_size=60) | text_ids)
    one = Detokenizer(tokenizer.decode, special_ids(tokenizer))
    pieces = [one.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + one.flush() == tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text("thequ ühr世🙂", max_size=40))
def test_no_piece_of_a_text_is_half_a_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    one = Detokenizer(tokenizer.decode, ())
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(token_ids)
    if "\ufffd" not in whole:
        assert all("\ufffd" not in one.push(token_id) for token_id in token_ids)


def test_a_special_token_that_is_shown_stands_between_what_surrounds_it() -> None:
    end = tiny_model.eos_id()
    token_ids = [*tiny_model.encode("the queue"), end, *tiny_model.encode(" in")]
    one = Detokenizer(tiny_model.tokenizer().decode, {end}, (), {end: "<|end|>"})
    assert "".join(map(one.push, token_ids)) + one.flush() == "the queue<|end|> in"
    half = tiny_model.encode("🙂")[:-1]
    one = Detokenizer(tiny_model.tokenizer().decode, {end}, (), {end: "<|end|>"})
    text = "".join(map(one.push, [*half, end, *tiny_model.encode("x")])) + one.flush()
    assert text == "\ufffd<|end|>x"
