"""Requests through the whole engine, and the same through transformers' continuous batching."""

import gc
import importlib
import importlib.util
import inspect
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bench.gpu.shapes import BUDGET, SHAPES, Figures, Scale, random_tensors
from bench.gpu.steps import Clock
from executor_svc.core.engine import LeaseRequest, SamplingParams
from executor_svc.torch_engine.config import EngineConfig, ModelSpec
from executor_svc.torch_engine.engine import TorchEngine
from executor_svc.torch_engine.models.tensors import tensor_shapes


def engine(device: torch.device, scale: Scale, shape: str) -> Figures:
    """Output tokens/s of requests at once, prefill included."""
    spec = SHAPES[shape]
    prompts = _prompts(spec, scale)
    params = SamplingParams(scale.output, temperature=0.0, ignore_eos=True)
    clock, count = Clock(device, 1), scale.requests * scale.output
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(spec, Path(name))
        config = EngineConfig(
            models=(("m", name),),
            device=str(device),
            max_num_seqs=scale.requests,
            max_num_batched_tokens=BUDGET,
            max_model_len=scale.context + scale.output,
            enable_prefix_caching=False,
        )
        for field, overlaps in (("tokens_per_s", True), ("tokens_per_s_one_by_one", False)):
            config = replace(config, overlap_scheduling=overlaps)
            seconds, figures["exactness_class"] = _ours(config, prompts, params, clock)
            figures[field] = count / seconds
            print(f"{field}: {figures[field]:.0f}", flush=True)
            gc.collect()  # the next one wants the memory
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return figures


def transformers(device: torch.device, scale: Scale, shape: str) -> Figures:
    """The same of transformers, where it is there."""
    if device.type != "cuda":
        return {"skipped": "its continuous batching wants a GPU"}
    if importlib.util.find_spec("transformers") is None:
        return {"skipped": "it is not installed"}
    spec, clock = SHAPES[shape], Clock(device, 1)
    prompts = _prompts(spec, scale)
    package: Any = importlib.import_module("transformers")
    settings = package.GenerationConfig(
        max_new_tokens=scale.output,
        min_new_tokens=scale.output,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(spec, Path(name))
        model = package.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    model = model.to(device)
    options: dict[str, Any] = {}
    if "persistent_manager" in inspect.signature(model.generate_batch).parameters:
        options["persistent_manager"] = True  # else its set-up would be timed with it
    num_made = 0

    def run() -> None:
        nonlocal num_made
        outputs = model.generate_batch(inputs=prompts, generation_config=settings, **options)
        num_made = sum(len(output.generated_tokens) for output in outputs.values())

    run()
    seconds = clock.once_s(run)
    return {"tokens_per_s": num_made / seconds, "num_tokens": num_made}


def _prompts(spec: ModelSpec, scale: Scale) -> list[list[int]]:
    return [
        [(7919 * j + 31 * i) % spec.vocab_size for j in range(scale.context)]
        for i in range(scale.requests)
    ]


def _ours(
    config: EngineConfig, prompts: list[list[int]], params: SamplingParams, clock: Clock
) -> tuple[float, str]:
    """Seconds of an engine for all requests, and its exactness class."""
    engine = TorchEngine(config)

    def run() -> None:
        for key, prompt in enumerate(prompts):
            engine.add(LeaseRequest(key, "m", prompt, params))
        num_made = 0
        while engine.has_work():
            num_made += len(engine.step().key)
        assert num_made == len(prompts) * params.max_tokens

    run()
    seconds = clock.once_s(run)
    engine.close()
    return seconds, engine.models[0].exactness_class


def write_checkpoint(spec: ModelSpec, folder: Path) -> None:
    """A random one of this shape, without a tokenizer."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "max_position_embeddings": spec.max_context_tokens,
        "tie_word_embeddings": spec.has_tied_head,
        "torch_dtype": str(spec.dtype)[6:],
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    take = random_tensors(spec, torch.device("cpu"))
    tensors = {name: take(name) for name in tensor_shapes(spec)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
