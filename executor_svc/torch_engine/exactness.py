"""What two engines must have in common to draw the same tokens, and the proof that this one can.

Rule: in exact mode the tokens and logprobs of a sequence depend on its own tokens, parameters and
nothing else: not on the other rows of a step, on chunks, on what a cache had, on preemption, or on
how much of it another engine had generated before. A stream may then change engines unseen, if
both are of one class: the digest of everything that bits depend on.

The class is proved, not declared. When a model is loaded for the first time, a probe is generated
alone; then it is continued from several places at once, so that what was decoded is now prefilled,
among as many others as have a seat, so that products have many numbers of rows. If one bit of a
logprob differs, the class is empty and nothing is promised. The bits are a part of the digest too:
they speak for whatever is not named in it.

On a GPU, cuBLAS splits the inner dimension of a product by heuristics that look at the number of
rows. ``prepare`` gives it no workspace to do so and forbids sums in reduced precision; this is
what vLLM does for VLLM_BATCH_INVARIANT on Hopper.
"""

import hashlib
import os
import struct
from dataclasses import dataclass, field, replace

import torch

from executor_svc.core.engine import LeaseRequest, ModelInfo, SamplingParams, StepOutput
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.resident import ResidentModel

# With the tokens drawn it passes 128, where the CPU's attention takes a greater width of keys: what
# is decoded below it is prefilled above.
_NUM_PROMPT_TOKENS = 126
_NUM_TOKENS = 4
# Another one passes 512 keys, where the CPU's attention begins a second block and the Triton
# kernels a third chunk. What it shares with the first one is in the cache, and goes on from there.
_NUM_LONG_PROMPT_TOKENS = 510
_GREEDY, _SAMPLED = 0, 1
# Which stream goes on after how many of its tokens, and whether the cache may help.
_CONTINUED = ((_GREEDY, 1, False), (_SAMPLED, 2, False), (_GREEDY, 3, True))
_MAX_COMPANY = 60  # short leases beside them, which end one after the other


@dataclass(slots=True)
class _Stream:
    """One sequence of the probe; equal streams have equal bits."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def split(self, index: int) -> tuple["_Stream", "_Stream"]:
        """The first ``index`` tokens, and the others."""
        return (
            _Stream(self.token_ids[:index], self.logprobs[:index]),
            _Stream(self.token_ids[index:], self.logprobs[index:]),
        )

    def bits(self) -> bytes:
        n = len(self.token_ids)
        return struct.pack(f"<{n}I{n}d", *self.token_ids, *self.logprobs)


def prepare(device: torch.device) -> None:
    """Make matrix products on this device independent of the number of rows, as far as it can be.

    To be called before the device is used.
    """
    if device.type != "cuda":
        return  # there it is a matter of how many rows there are, see linear.py
    # For cuBLAS, which reads them when it starts; a setting of ours would mean nothing to it.
    os.putenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    os.putenv("CUBLASLT_WORKSPACE_SIZE", "1")
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def exactness_class(
    model: ResidentModel, info: ModelInfo, config: EngineConfig, device: torch.device
) -> str:
    """Hex SHA-256, or empty if the model's result depends on its company.

    ``model`` has no lease; it is driven through a few steps.
    """
    streams = _probe(model, info, num_seats=config.max_num_seqs)
    if streams is None:
        return ""
    ingredients = (
        info.family,
        info.weights_digest,
        info.assets_digest,
        info.dtype,
        config.quantization,
        str(config.tensor_parallel_size),
        model.attention_numerics,
        torch.__version__,
        _device_kind(device),
    )
    digest = hashlib.sha256()
    for part in (*map(str.encode, ingredients), *(stream.bits() for stream in streams)):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _device_kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _probe(model: ResidentModel, info: ModelInfo, num_seats: int) -> list[_Stream] | None:
    """The greedy and the sampled stream; None if they are others in company."""
    num_tokens = min(_NUM_TOKENS, info.max_context_tokens // 2)
    num_prompt_tokens = min(_NUM_PROMPT_TOKENS, info.max_context_tokens - num_tokens)
    if num_tokens < 1:
        return None
    # Any tokens do; this walk visits many of them.
    walk = [7919 * i % info.vocab_size for i in range(1, _NUM_LONG_PROMPT_TOKENS + 1)]
    prompt = walk[:num_prompt_tokens]
    params = [_params(num_tokens, temperature) for temperature in (0.0, 1.0)]
    whole = [
        _run(model, [LeaseRequest(0, info.name, prompt, param, cache_salt="alone")])[0]
        for param in params
    ]
    if any(len(stream.token_ids) < num_tokens for stream in whole):
        return None  # its logits are no numbers
    company = [
        LeaseRequest(100 + i, info.name, prompt[i : i + 1], _params(1 + i % num_tokens, 1.0))
        for i in range(min(num_seats, _MAX_COMPANY, num_prompt_tokens))
    ]
    continued, expected = [], {}
    for key, (which, after, is_cached) in enumerate(_CONTINUED):
        held, rest = whole[which].split(after)
        if rest.token_ids:
            lease = LeaseRequest(key, info.name, prompt, params[which], generated=(held.token_ids,))
            salt = "alone" if is_cached else f"in company {key}"
            continued.append(replace(lease, cache_salt=salt))
            expected[key] = rest
    if len(walk) + num_tokens <= info.max_context_tokens:
        # Not a part of the digest: engines of one class may have contexts of different lengths.
        long = LeaseRequest(len(_CONTINUED), info.name, walk, params[_SAMPLED], cache_salt="alone")
        held, rest = _run(model, [long])[long.key].split(num_tokens - 1)
        if not rest.token_ids:
            return None
        continued.append(replace(long, generated=(held.token_ids,)))
        expected[long.key] = rest
    streams = _run(model, [*continued, *company])
    return whole if all(streams[key] == rest for key, rest in expected.items()) else None


def _params(num_tokens: int, temperature: float) -> SamplingParams:
    return SamplingParams(num_tokens, temperature=temperature, seed=1, ignore_eos=True)


def _run(model: ResidentModel, leases: list[LeaseRequest]) -> dict[int, _Stream]:
    """Streams by key, as far as they came."""
    streams = {lease.key: _Stream() for lease in leases}
    for lease in leases:
        model.add(lease)
    while model.has_work():
        output = StepOutput()
        model.step(output)
        for key, token_id, logprob in zip(output.key, output.token_id, output.logprob, strict=True):
            streams[key].token_ids.append(token_id)
            streams[key].logprobs.append(logprob)
    return streams
