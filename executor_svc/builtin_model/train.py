"""Train the built-in model: `python -m executor_svc.builtin_model.train --minutes 25 --seed 0`.

Needs the `dev` extra (transformers) and no network. One run makes every file that the model needs
to be loaded, in `--out`, and ends with one line of JSON on stdout.

Theory of operation: every epoch is drawn anew from plain documentation and from chats. Hidden
matrices learn by Muon, which gets more out of few tokens than AdamW does; embeddings and norms
learn by AdamW. The learning rate warms up, holds, and falls to zero at the end of the budget. With
`--steps` the run depends on the seed alone, as far as torch's kernels do. With `--minutes` it
depends on how busy the machine is too: the learning rate follows the clock.
"""

import argparse
import json
import math
import pathlib
import random
import sys
import time

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from executor_svc.builtin_model import corpus
from executor_svc.builtin_model.tokenizer import (
    CHAT_END,
    CONTEXT_LENGTH,
    END_OF_TEXT,
    VOCABULARY_SIZE,
    save_tokenizer,
    token_id,
    train_tokenizer,
    write_json,
)
from executor_svc.builtin_model.windows import IGNORED, Chats, Documentation, Windows, batches

HOME = pathlib.Path(__file__).resolve().parent

LEARNING_RATE = 5e-3
WARMUP_FRACTION = 0.02
COOLDOWN_FRACTION = 0.6
WEIGHT_DECAY = 0.1
PROGRESS_EVERY_STEPS = 50


def make_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, CHAT_END),
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
    )
    return Qwen3ForCausalLM(config)


def token_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats.

    hidden  # [tokens, hidden]
    weight  # [vocabulary, hidden]
    labels  # [tokens]
    """
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
    return torch.nn.functional.cross_entropy(logits.float(), labels)


compiled_token_loss = torch.compile(token_loss, dynamic=True)


def loss_of(model: Qwen3ForCausalLM, windows: Windows) -> torch.Tensor:
    """Mean loss of the labelled positions; the output layer runs on no others."""
    inputs, labels = windows
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(inputs, use_cache=False).last_hidden_state
    is_due = labels != IGNORED
    return compiled_token_loss(hidden[is_due], model.lm_head.weight, labels[is_due])


def learning_rate_factor(progress: float) -> float:
    """Progress from 0 to 1: a short rise, a plateau, a straight fall to zero."""
    rise = progress / WARMUP_FRACTION
    fall = (1.0 - progress) / COOLDOWN_FRACTION
    return max(0.0, min(1.0, rise, fall))


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embeddings = [p for name, p in model.named_parameters() if "embed" in name]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(
            matrices,
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": embeddings, "weight_decay": WEIGHT_DECAY},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(0.9, 0.95),
        ),
    ]


@torch.no_grad()
def held_out_loss(
    model: Qwen3ForCausalLM, texts: list[str], tokenizer: Tokenizer
) -> tuple[float, float]:
    """Loss in nats per token, and bits per byte, on documentation never trained on."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    end = token_id(tokenizer, END_OF_TEXT)
    for text in texts:
        tokens = [*tokenizer.encode(text).ids, end][: CONTEXT_LENGTH // 4]
        windows = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
        nats += loss_of(model, windows).item() * (len(tokens) - 1)
        num_tokens += len(tokens) - 1
        num_bytes += len(tokenizer.decode(tokens[1:], skip_special_tokens=True).encode())
    return nats / num_tokens, nats / math.log(2) / num_bytes


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: pathlib.Path) -> int:
    """Write weights and configurations; returns the size of the weights in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, out)
    model.bfloat16().save_pretrained(out)
    ends = [token_id(tokenizer, token) for token in (CHAT_END, END_OF_TEXT)]
    write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.4,
            "top_p": 0.9,
            "eos_token_id": ends,
            "pad_token_id": ends[1],
        },
    )
    weights = sorted(out.glob("*.safetensors"))
    for path in weights:
        path.chmod(0o644)  # safetensors writes for the owner only
    return sum(path.stat().st_size for path in weights)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--window-length", type=int, default=256, help="tokens per window")
    parser.add_argument("--eager", action="store_true", help="do without a C++ compiler; slower")
    parser.add_argument("--out", type=pathlib.Path, default=HOME, help="folder to write to")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    random_source = random.Random(arguments.seed)
    out = arguments.out.resolve()
    if arguments.eager:
        torch.compiler.set_stance("force_eager")

    entries = corpus.collect()
    trained_on = [entry for entry in entries if not entry.is_held_out]
    texts = corpus.plain_texts(trained_on)
    seen = {entry.text for entry in trained_on}
    held_out = corpus.plain_texts([e for e in entries if e.is_held_out and e.text not in seen])
    tokenizer = train_tokenizer(texts)
    model = make_model(tokenizer)
    num_parameters = model.num_parameters()
    length = arguments.window_length
    sources = Documentation(texts, tokenizer, length), Chats(trained_on, tokenizer, length)
    _say(f"{len(entries)} entries, {sum(map(len, texts))} characters, {num_parameters} parameters")

    started = time.monotonic()
    optimizers = make_optimizers(model)
    model.model.compile()
    recent_loss = math.nan
    step = 0
    for windows in batches(sources, random_source, arguments.batch_size):
        elapsed = (time.monotonic() - started) / 60
        progress = step / arguments.steps if arguments.steps else elapsed / arguments.minutes
        if progress >= 1.0:
            break
        loss = loss_of(model, windows)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * learning_rate_factor(progress)
            optimizer.step()
            optimizer.zero_grad()
        recent_loss = loss.item() if step == 0 else 0.98 * recent_loss + 0.02 * loss.item()
        step += 1
        if step % PROGRESS_EVERY_STEPS == 0:
            _say(f"step {step} minutes {elapsed:.1f} train_loss {recent_loss:.3f}")

    num_bytes = save(model, tokenizer, out)
    torch.compiler.set_stance("force_eager")  # every document has another length
    val_loss, val_bits_per_byte = held_out_loss(model, held_out, tokenizer)
    result = {
        "train_loss": round(recent_loss, 4),
        "val_loss": round(val_loss, 4),
        "val_bits_per_byte": round(val_bits_per_byte, 4),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "steps": step,
        "tokens": step * arguments.batch_size * length,
        "parameters": num_parameters,
        "bytes": num_bytes,
    }
    _say(json.dumps(result))


if __name__ == "__main__":
    main()
