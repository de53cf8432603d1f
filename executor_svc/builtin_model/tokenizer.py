"""The built-in model's tokenizer and chat template.

Rule: byte-level BPE, so that any text has tokens; the template file is the one source of the chat
format, in training as in serving.
"""

import json
import pathlib
import shutil
from collections.abc import Callable

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY_SIZE = 4096
CONTEXT_LENGTH = 2048

_TEMPLATE_PATH = pathlib.Path(__file__).resolve().parent / "chat_template.jinja"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, CHAT_START, CHAT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: pathlib.Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(out / "tokenizer.json"))
    if out != _TEMPLATE_PATH.parent:
        shutil.copy(_TEMPLATE_PATH, out)
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT_LENGTH,
            "clean_up_tokenization_spaces": False,
            "bos_token": None,
            "eos_token": CHAT_END,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
        },
    )


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, f"{token} is not in the vocabulary"
    return found


def load_template() -> Callable[..., str]:
    """The chat template as `render(messages=..., add_generation_prompt=...)`."""
    # Autoescape is for HTML; these are the settings that transformers renders with.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    return environment.from_string(_TEMPLATE_PATH.read_text(encoding="utf-8")).render


def write_json(path: pathlib.Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
