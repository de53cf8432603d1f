"""What ends a sequence: EOS, stop tokens, stop strings, lengths."""

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from executor_svc.core.engine import FinishReason, InvalidLeaseError, SamplingParams, SequenceEnd
from executor_svc.core.stopping import StopMatcher
from executor_svc.torch_engine.token_bytes import TokenBytes
from headway.reasons import Reason
from tests.engine.checkpoints import make_checkpoint
from tests.engine.driving import build, lease, run

PROMPT = [10, 20, 30]
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(qwen3: Path) -> Tokenizer:
    return Tokenizer.from_file(str(qwen3 / "tokenizer.json"))


def _free_text(folder: Path, seed: int = 0) -> list[int]:
    """40 tokens that nothing stops."""
    params = SamplingParams(max_tokens=40, seed=seed, ignore_eos=True)
    return run(build(folder), lease(0, PROMPT, params)).tokens[0]


def _first_end(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[int, str] | None:
    """By brute force: the first token after which the whole text holds a stop string."""
    text = b""
    for index, piece in enumerate(pieces):
        text += piece
        found = [(text.find(s.encode()) + len(s.encode()), s) for s in stops if s.encode() in text]
        if found:
            return index, min(found, key=lambda one: one[0])[1]
    return None


def test_matcher_finds_stops_across_pieces() -> None:
    matcher = StopMatcher(("hello", "lo wo"))
    assert [matcher.feed(piece) for piece in (b"he", b"l", b"", b"l", b"o wo")][-1] == "hello"


def test_matcher_reports_a_match_once() -> None:
    matcher = StopMatcher(("ab", "long stop"))
    assert [matcher.feed(piece) for piece in (b"xab", b"c", b"a", b"b")] == ["ab", None, None, "ab"]


def test_matcher_sees_split_characters() -> None:
    matcher = StopMatcher(("🙂",))
    pieces = [bytes([byte]) for byte in "ü🙂".encode()]
    assert [matcher.feed(piece) for piece in pieces] == [None] * 5 + ["🙂"]


def test_token_bytes_are_the_text(qwen3: Path, tokenizer: Tokenizer) -> None:
    pieces = TokenBytes((qwen3 / "tokenizer.json").read_bytes())
    text = "Grüße, 日本語 🙂🚀 \n\t def f(): <|im_end|> 'x'"
    ids = tokenizer.encode(text).ids
    assert len(ids) > 20
    assert b"".join(pieces[token_id] for token_id in ids).decode() == text
    assert pieces[319] == tokenizer.decode([319], skip_special_tokens=False).encode()
    assert pieces[100_000] == b""


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_across_tokens(qwen3: Path, seed: int) -> None:
    tokens = _free_text(qwen3, seed)
    table = TokenBytes((qwen3 / "tokenizer.json").read_bytes())
    pieces = [table[token_id] for token_id in tokens]
    ascii_at = [i for i in range(5, 38) if (pieces[i] + pieces[i + 1]).isascii()]
    if not ascii_at:
        pytest.skip("this seed draws no two ASCII tokens in a row")
    i = ascii_at[-1]
    # Ends inside one token, starts inside the one before.
    stop = (pieces[i][-1:] + pieces[i + 1][:1]).decode()
    stops = ("never ever", stop)
    expected = _first_end(pieces, stops)
    assert expected is not None

    params = SamplingParams(max_tokens=40, seed=seed, ignore_eos=True, stop_strings=stops)
    engine = build(qwen3)
    record = run(engine, lease(0, PROMPT, params))
    assert record.tokens[0] == tokens[: expected[0] + 1]
    assert record.ends[0] == SequenceEnd(
        0, expected[0] + 1, FinishReason.STOP, stop_string=expected[1]
    )
    # The matcher is fed with what an earlier attempt made, wherever it was cut.
    cuts = range(expected[0] + 1)
    rest = run(engine, *(lease(held, PROMPT, params, generated=(tokens[:held],)) for held in cuts))
    for held in cuts:
        assert rest.ends[held] == replace(record.ends[0], key=held)
        assert rest.tokens[held] == record.tokens[0][held:]


def test_multi_byte_stop_strings_in_generated_tails(qwen3: Path, tokenizer: Tokenizer) -> None:
    """A stop of two emoji, of which the earlier attempt made all but the last byte's token."""
    emoji = tokenizer.encode("日🙂").ids
    assert len(emoji) > 2
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop_strings=("日🙂",))
    engine = build(qwen3)
    whole = run(engine, lease(0, PROMPT, params, generated=([9, *emoji],)))
    assert whole.tokens == {}  # it was over already
    assert whole.ends[0] == SequenceEnd(0, 1 + len(emoji), FinishReason.STOP, stop_string="日🙂")
    part = run(engine, lease(0, PROMPT, params, generated=([9, *emoji[:-1]],)))
    assert part.ends[0].num_tokens > 1 + len(emoji[:-1])


def test_eos_ends_and_stays_in_the_output(qwen3: Path) -> None:
    # Hot enough for some sequence to draw EOS among 320 tokens.
    params = [SamplingParams(max_tokens=60, temperature=3, seed=seed) for seed in range(24)]
    record = run(build(qwen3), *(lease(key, PROMPT, one) for key, one in enumerate(params)))
    stopped = [end for end in record.ends.values() if end.reason is FinishReason.STOP]
    assert stopped
    for end in stopped:
        tokens = record.tokens[end.key]
        assert end.stop_token_id == tokens[-1] == EOS
        assert tokens.index(EOS) == end.num_tokens - 1

    key = stopped[0].key
    free = replace(params[key], ignore_eos=True)
    longer = run(build(qwen3), lease(0, PROMPT, free)).tokens[0]
    assert longer[: len(record.tokens[key])] == record.tokens[key]
    assert len(longer) == 60

    patient = replace(params[key], min_tokens=50)
    assert run(build(qwen3), lease(0, PROMPT, patient)).ends[0].num_tokens > 50


def test_stop_token_ids_and_min_tokens(qwen3: Path) -> None:
    tokens = _free_text(qwen3)
    stop = tokens[7]
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(stop,))
    end = run(build(qwen3), lease(0, PROMPT, params)).ends[0]
    assert end == SequenceEnd(0, tokens.index(stop) + 1, FinishReason.STOP, stop_token_id=stop)
    later = SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(stop,), min_tokens=20)
    record = run(build(qwen3), lease(0, PROMPT, later))
    assert stop not in record.tokens[0][:20]


def test_stop_strings_wait_for_min_tokens(qwen3: Path) -> None:
    params = SamplingParams(
        max_tokens=40, ignore_eos=True, stop_strings=tuple("etaoin shrdlu"), min_tokens=15
    )
    assert run(build(qwen3), lease(0, PROMPT, params)).ends[0].num_tokens > 15


def test_length_ends_at_max_tokens_and_counts_generated(qwen3: Path) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    record = run(build(qwen3), lease(0, PROMPT, params, generated=([7, 8, 9],)))
    assert record.indices[0] == [3, 4]
    assert record.ends[0] == SequenceEnd(0, 5, FinishReason.LENGTH)
    full = run(build(qwen3), lease(0, PROMPT, params, generated=([7, 8, 9, 10, 11],)))
    assert full.tokens == {}
    assert full.ends[0] == SequenceEnd(0, 5, FinishReason.LENGTH)


def test_without_a_tokenizer_stop_strings_are_refused(tmp_path: Path) -> None:
    engine = build(make_checkpoint(tmp_path, with_tokenizer=False))
    assert engine.assets("tiny").tokenizer_json == b""
    with pytest.raises(InvalidLeaseError, match="tokenizer") as caught:
        engine.add(lease(0, PROMPT, SamplingParams(max_tokens=3, stop_strings=("x",))))
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert len(run(engine, lease(0, PROMPT)).tokens[0]) <= 8
