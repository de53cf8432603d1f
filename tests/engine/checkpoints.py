"""Tiny checkpoints with random weights, made on the spot with transformers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A queue in front of a fleet: first come, first served, but nobody starves.",
    "Grüße aus Köln! 日本語のテキストもあります。 Emoji: 🙂🚀",
    "def step(self): return [token for token in self.running if token]",
]


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "qwen3": Qwen3Config,
    "llama": partial(LlamaConfig, rope_parameters=_LLAMA3_ROPE),
    "qwen2": Qwen2Config,
    "mistral": partial(MistralConfig, sliding_window=None),
    "qwen3_moe": partial(
        Qwen3MoeConfig, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32
    ),
}


def make_checkpoint(
    folder: Path,
    family: str = "qwen3",
    *,
    sharded: bool = False,
    tied: bool = False,
    vocab_size: int = 320,
    with_tokenizer: bool = True,
    seed: int = 0,
    max_context: int = 1024,
    **fields: Any,
) -> Path:
    """Write a 2-layer model (hidden 64, 4 heads on 2 kv heads) in float32; returns ``folder``.

    Llama comes with llama3 rope scaling. The EOS token is <|im_end|>, id 2. ``fields`` are more
    fields of the family's config.
    """
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": max_context,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,  # wide enough for distributions that are not flat
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = _CONFIGS[family](**shape | fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if family not in ("qwen3", "llama"):
        _shake_vectors(model)
    model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=0)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    if with_tokenizer:
        _make_tokenizer(vocab_size).save_pretrained(folder)
    return folder


def _shake_vectors(model: PreTrainedModel) -> None:
    """Biases and norms other than the zeros and ones that they begin with."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Of a checkpoint in one file."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path)


def reference_model(folder: Path) -> PreTrainedModel:
    """The same checkpoint as transformers runs it, in float32 with plain attention."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def _make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so any text can be encoded; special tokens have the ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, chat_template=CHAT_TEMPLATE
    )
