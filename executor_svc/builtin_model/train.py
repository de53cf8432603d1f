"""Train the built-in model: `python -m executor_svc.builtin_model.train --minutes 25 --seed 0`.

Needs the `dev` extra (transformers) and no network. One run makes every file that the model needs
to be loaded, in `--out`, and ends with one line of JSON on stdout.

Theory of operation: half of each epoch's windows are plain documentation cut from one long stream
at an offset that differs from epoch to epoch; the other half are whole chats, with loss on the
answers only. Hidden matrices learn by Muon, which gets more out of few tokens than AdamW does;
embeddings and norms learn by AdamW. The learning rate warms up, holds, and falls to zero at the
end of the budget. With `--steps` the run depends on the seed alone; with `--minutes` the number of
steps depends on how fast the machine is, and the last line names it for a repetition.
"""

import argparse
import json
import math
import pathlib
import random
import shutil
import sys
import time
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from executor_svc.builtin_model import chats, corpus

HOME = pathlib.Path(__file__).resolve().parent
END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY_SIZE = 4096
CONTEXT_LENGTH = 2048
IGNORED = -100  # the label that cross_entropy skips

LEARNING_RATE = 5e-3
WARMUP_FRACTION = 0.02
COOLDOWN_FRACTION = 0.6
WEIGHT_DECAY = 0.1
PROGRESS_EVERY_STEPS = 50

# inputs, labels  # [windows, window_length] each; labels are already shifted by one
Windows = tuple[torch.Tensor, torch.Tensor]


def train_tokenizer(texts: list[str], out: pathlib.Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has tokens; writes tokenizer.json and its companions."""
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
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    if out != HOME:
        shutil.copy(HOME / "chat_template.jinja", out)
    _write_json(
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
    return PreTrainedTokenizerFast.from_pretrained(out)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
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
        eos_token_id=tokenizer.convert_tokens_to_ids(CHAT_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    return Qwen3ForCausalLM(config)


class Documentation:
    """Plain documentation as one token stream, cut into windows."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        self._documents = tokenizer(texts)["input_ids"]
        self._end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self._length = length

    def windows(self, random_source: random.Random) -> Windows:
        documents = random_source.sample(self._documents, len(self._documents))
        stream = [token for document in documents for token in (*document, self._end)]
        stream = stream[random_source.randrange(self._length) :]
        num_windows = (len(stream) - 1) // self._length
        tokens = torch.tensor(stream[: num_windows * self._length + 1])
        return (
            tokens[:-1].view(num_windows, self._length),
            tokens[1:].view(num_windows, self._length),
        )


class Chats:
    """Chats rendered by the model's own template; a window holds whole chats only."""

    def __init__(
        self, entries: list[corpus.Entry], tokenizer: PreTrainedTokenizerFast, length: int
    ) -> None:
        self._entries = entries
        self._tokenizer = tokenizer
        self._pad = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self._length = length

    def windows(self, random_source: random.Random) -> Windows:
        conversations = chats.make_chats(self._entries, random_source)
        inputs: list[list[int]] = []
        labels: list[list[int]] = []
        for tokens, targets in self._tokenised(conversations):
            if len(tokens) > self._length:
                continue
            if not inputs or len(inputs[-1]) + len(tokens) > self._length:
                inputs.append([])
                labels.append([])
            inputs[-1] += tokens
            labels[-1] += targets
        for row, targets in zip(inputs, labels, strict=True):
            row += [self._pad] * (self._length - len(row))
            targets += [IGNORED] * (self._length - len(targets))
        return torch.tensor(inputs), torch.tensor(labels)

    def _tokenised(
        self, conversations: list[list[chats.Message]]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids, and for each position the id to predict there where an answer is due."""
        render = self._tokenizer.apply_chat_template
        pieces: list[str] = []
        is_answer: list[bool] = []
        num_pieces: list[int] = []
        for messages in conversations:
            num_before = len(pieces)
            done = ""
            for index, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                asked = render(messages[:index], tokenize=False, add_generation_prompt=True)
                answered = render(messages[: index + 1], tokenize=False)
                after_answer = answered.removesuffix("\n")
                pieces += [asked[len(done) :], after_answer[len(asked) :]]
                is_answer += [False, True]
                done = after_answer
            num_pieces.append(len(pieces) - num_before)
        token_lists = iter(self._tokenizer(pieces)["input_ids"])
        flags = iter(is_answer)
        for count in num_pieces:
            tokens: list[int] = []
            wanted: list[int] = []
            for _ in range(count):
                piece = next(token_lists)
                tokens += piece
                wanted += piece if next(flags) else [IGNORED] * len(piece)
            yield tokens, [*wanted[1:], IGNORED]


def batches(
    sources: tuple[Documentation, Chats], random_source: random.Random, batch_size: int
) -> Iterator[Windows]:
    """Endless shuffled batches; each epoch draws every source anew."""
    while True:
        drawn = [source.windows(random_source) for source in sources]
        inputs, labels = (torch.cat(part) for part in zip(*drawn, strict=True))
        order = list(range(len(inputs)))
        random_source.shuffle(order)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield inputs[rows], labels[rows]


def loss_of(model: Qwen3ForCausalLM, windows: Windows) -> torch.Tensor:
    """Mean cross entropy in nats per token; the output layer runs where a label is due only."""
    inputs, labels = windows
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(inputs, use_cache=False).last_hidden_state
        is_due = labels != IGNORED
        logits = model.lm_head(hidden[is_due])
    return torch.nn.functional.cross_entropy(logits.float(), labels[is_due])


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
    model: Qwen3ForCausalLM, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[float, float]:
    """Loss in nats per token, and bits per byte, on documentation never trained on."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    for text in texts:
        tokens = [*tokenizer(text)["input_ids"], end][: CONTEXT_LENGTH // 4]
        windows = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
        nats += float(loss_of(model, windows)) * (len(tokens) - 1)
        num_tokens += len(tokens) - 1
        num_bytes += len(tokenizer.decode(tokens[1:], skip_special_tokens=True).encode())
    return nats / num_tokens, nats / math.log(2) / num_bytes


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: pathlib.Path) -> int:
    """Write weights and configurations; returns the size of the weights in bytes."""
    model.generation_config = None
    model.to(torch.bfloat16).save_pretrained(out)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (CHAT_END, END_OF_TEXT)]
    _write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.4,
            "top_p": 0.9,
            "eos_token_id": ends,
            "pad_token_id": ends[1],
        },
    )
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def _write_json(path: pathlib.Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
    parser.add_argument("--out", type=pathlib.Path, default=HOME, help="folder to write to")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    random_source = random.Random(arguments.seed)  # noqa: S311
    out = arguments.out.resolve()

    entries = corpus.collect()
    trained_on = [entry for entry in entries if not entry.is_held_out]
    texts = corpus.plain_texts(trained_on)
    seen = {entry.text for entry in trained_on}
    held_out = corpus.plain_texts([e for e in entries if e.is_held_out and e.text not in seen])
    tokenizer = train_tokenizer(texts, out)
    model = make_model(tokenizer)
    num_parameters = model.num_parameters()
    length = arguments.window_length
    sources = Documentation(texts, tokenizer, length), Chats(trained_on, tokenizer, length)
    _say(f"{len(entries)} entries, {sum(map(len, texts))} characters, {num_parameters} parameters")

    optimizers = make_optimizers(model)
    started = time.monotonic()
    recent_loss = math.nan
    step = 0
    for windows in batches(sources, random_source, arguments.batch_size):
        elapsed = (time.monotonic() - started) / 60
        progress = step / arguments.steps if arguments.steps else elapsed / arguments.minutes
        if progress >= 1.0:
            break
        loss = loss_of(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * learning_rate_factor(progress)
            optimizer.step()
            optimizer.zero_grad()
        recent_loss = float(loss) if step == 0 else 0.98 * recent_loss + 0.02 * float(loss)
        step += 1
        if step % PROGRESS_EVERY_STEPS == 0:
            _say(f"step {step} minutes {elapsed:.1f} train_loss {recent_loss:.3f}")

    num_bytes = save(model.eval(), tokenizer, out)
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
