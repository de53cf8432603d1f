"""A byte-level tokenizer made on the spot, a chat template, a reply that splits characters."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from headway.v1 import generation_pb2, scheduler_pb2

NAME = "test/tiny"
BARE_NAME = "test/bare"  # the same without any files
CONTEXT = 512
REPLY = "Grüße, 世界! 🙂👩‍🚀 ok."
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('assistant first') }}{% endif %}\n"
    "{% for message in messages %}\n"
    "<|{{ message.role }}|>{{ message.content }}<|end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the queue in front of the fleet, ok."] * 4, trainer)
    names = ("<|system|>", "<|user|>", "<|assistant|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


def eos_id() -> int:
    token_id = tokenizer().token_to_id("<|end|>")
    assert token_id is not None
    return int(token_id)


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def card(name: str = NAME, digest: str = "assets-1") -> generation_pb2.ModelCard:
    return generation_pb2.ModelCard(
        name=name,
        family="test",
        vocab_size=tokenizer().get_vocab_size(),
        max_context_tokens=CONTEXT,
        eos_token_ids=[eos_id()],
        assets_digest=digest if name == NAME else "assets-0",
    )


def assets(name: str = NAME) -> generation_pb2.ModelAssets:
    if name != NAME:
        return generation_pb2.ModelAssets()
    return generation_pb2.ModelAssets(
        tokenizer_json=tokenizer().to_str().encode(),
        tokenizer_config_json=json.dumps({"eos_token": {"content": "<|end|>"}}).encode(),
        chat_template=TEMPLATE,
    )


def response(name: str, known_digest: str) -> scheduler_pb2.GetModelResponse:
    own = card(name)
    is_known = known_digest == own.assets_digest
    return scheduler_pb2.GetModelResponse(card=own, assets=None if is_known else assets(name))
