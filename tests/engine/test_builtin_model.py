"""The built-in model loads anywhere, fits its budget, and says words."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from executor_svc import builtin_model
from executor_svc.builtin_model import chats, corpus, tokenizer, windows

FOLDER = Path(builtin_model.__file__).parent
MAX_WEIGHT_BYTES = 8_000_000


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


@pytest.fixture(scope="module")
def hf_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def entries() -> list[corpus.Entry]:
    return corpus.collect()


def greedy(model: Any, hf_tokenizer: Any, prompt: str, max_tokens: int) -> list[int]:
    tokens = torch.tensor([hf_tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=model.generation_config.eos_token_id,
                pad_token_id=model.generation_config.pad_token_id,
            ),
        )
    return output[0, tokens.shape[1] :].tolist()


def answer(model: Any, hf_tokenizer: Any, question: str) -> tuple[str, bool]:
    """The greedy answer, and whether the model itself ended it."""
    messages = [{"role": "user", "content": question}]
    prompt = hf_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = greedy(model, hf_tokenizer, prompt, max_tokens=150)
    has_ended = tokens[-1] == hf_tokenizer.convert_tokens_to_ids(tokenizer.CHAT_END)
    return hf_tokenizer.decode(tokens, skip_special_tokens=True), has_ended


def test_weights_fit_the_budget() -> None:
    weights = list(FOLDER.glob("*.safetensors"))
    assert weights
    assert sum(path.stat().st_size for path in weights) <= MAX_WEIGHT_BYTES


def test_model_is_a_small_qwen3(model: Any) -> None:
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 2048
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.dtype == torch.bfloat16


def test_ends_are_the_chat_end_and_the_end_of_text(model: Any, hf_tokenizer: Any) -> None:
    chat_end, end_of_text = hf_tokenizer.convert_tokens_to_ids(
        [tokenizer.CHAT_END, tokenizer.END_OF_TEXT]
    )
    assert model.generation_config.eos_token_id == [chat_end, end_of_text]
    assert model.config.eos_token_id == chat_end == hf_tokenizer.eos_token_id
    assert hf_tokenizer.vocab_size <= model.config.vocab_size


def test_tokenizer_gives_any_text_back(hf_tokenizer: Any) -> None:
    text = "  def naïve(x):\n\treturn '日本 🙂'  # done\r\n"
    tokens = hf_tokenizer(text)["input_ids"]
    assert hf_tokenizer.decode(tokens) == text


def test_chat_template_renders(hf_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    rendered = hf_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert rendered == expected
    assert tokenizer.load_template()(messages=messages, add_generation_prompt=True) == expected


def test_chat_template_joins_text_parts() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    rendered = tokenizer.load_template()(messages=[{"role": "user", "content": parts}])
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize(
    "prompt",
    [
        'The "with" statement is used to',
        "json.dumps(obj, *, indent=None)\n\n",
        "Return a list of",
    ],
)
def test_continuation_is_made_of_words(
    model: Any,
    hf_tokenizer: Any,
    entries: list[corpus.Entry],
    prompt: str,
) -> None:
    text = hf_tokenizer.decode(greedy(model, hf_tokenizer, prompt, 60), skip_special_tokens=True)
    said = corpus.words(text)
    known = corpus.vocabulary(entries)
    assert len(said) >= 4
    assert sum(word in known for word in said) >= 0.9 * len(said), text


def test_chats_end_by_themselves(model: Any, hf_tokenizer: Any) -> None:
    for question in ("hello", "What does json.dumps do?", "Explain textwrap.fill"):
        text, has_ended = answer(model, hf_tokenizer, question)
        assert has_ended, text
        assert len(corpus.words(text)) >= 4, text


def test_it_says_what_it_is(model: Any, hf_tokenizer: Any) -> None:
    text, _ = answer(model, hf_tokenizer, "Who are you?")
    assert "demo model" in text


def test_corpus_is_repeatable_and_names_are_unique(entries: list[corpus.Entry]) -> None:
    assert entries == corpus.collect()
    assert len({entry.name for entry in entries}) == len(entries)
    assert {"json.dumps", "str.split", "len", "math", "topic with"} <= {e.name for e in entries}


def test_held_out_entries_are_few_and_never_builtins(entries: list[corpus.Entry]) -> None:
    held_out = [entry for entry in entries if entry.is_held_out]
    assert 0 < len(held_out) < 0.05 * len(entries)
    assert all(entry.module != "builtins" for entry in held_out)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Serialize ``obj`` to\na ``str``.\n\nMore.", "Serialize obj to a str."),
        ("S.strip() -> str\n\nReturn a stripped copy", "Return a stripped copy."),
        ("range(n) -> range\nrange(m, n) -> range\n\nReturn an object.", "Return an object."),
        ("See :func:`~os.walk` for more of it.", "See os.walk for more of it."),
        (">>> 1 + 1\n2", ""),
    ],
)  # fmt: skip
def test_summary_is_prose(docstring: str, expected: str) -> None:
    assert chats.summary(docstring) == expected


def test_only_answers_are_to_be_predicted() -> None:
    entry = corpus.Entry("spam.fry", "spam", "function", "(egg)", "Fry an egg in a pan.")
    trained = tokenizer.train_tokenizer([entry.as_plain_text()])
    inputs, labels = windows.Chats([entry], trained, 256).windows(random.Random(0))
    end = tokenizer.token_id(trained, tokenizer.CHAT_END)
    for row, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
        due = [i for i, target in enumerate(targets) if target != windows.IGNORED]
        assert all(targets[i] == row[i + 1] for i in due if i + 1 < len(row))
        assert targets.count(end) == trained.decode(row, skip_special_tokens=False).count(
            "<|im_start|>assistant"
        )
        predicted = trained.decode([targets[i] for i in due], skip_special_tokens=False)
        assert "<|im_start|>" not in predicted
