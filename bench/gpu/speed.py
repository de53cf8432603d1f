"""What the device can do, and the engine's steps beside it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from bench.gpu.shapes import (
    SHAPES,
    Figures,
    Scale,
    num_multiplied,
    prefill_operations,
    product_shapes,
    step_bytes,
)
from bench.gpu.steps import Clock, Steps
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.exactness import prepare
from executor_svc.torch_engine.host_weights import HostWeights, WeightSource
from executor_svc.torch_engine.known_model import KnownModel
from executor_svc.torch_engine.linear import Linear, make_linear, pad_rows
from executor_svc.torch_engine.models.collectives import ALONE

_PROFILED_STEPS = 5
_NUM_LONGEST = 12
_COLD_BYTES = 1 << 30  # many times what a GPU's cache holds


def ceilings(device: torch.device, scale: Scale) -> Figures:
    """The most that copies, products and transfers from the host reach."""
    clock = Clock(device, scale.num_steps)
    source = torch.ones(scale.copy_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy_s = clock.median_s(lambda: target.copy_(source))
    a = torch.randn(scale.product, scale.product, dtype=torch.bfloat16, device=device)
    product_s = clock.median_s(lambda: a @ a)
    host = torch.ones(scale.copy_bytes // 4, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
    transfer_s = clock.median_s(lambda: target[: len(host)].copy_(host, non_blocking=True))
    return {
        "bytes_per_s": 2 * scale.copy_bytes / copy_s,
        "operations_per_s": 2 * scale.product**3 / product_s,
        "host_bytes_per_s": scale.copy_bytes / 2 / transfer_s,
    }


def decode(
    device: torch.device,
    scale: Scale,
    shape: str,
    limits: Mapping[str, float],
    *,
    is_exact: bool = True,
    temperature: float = 0.0,
) -> Figures:
    """Tokens/s by batch size."""
    spec, clock = SHAPES[shape], Clock(device, scale.num_steps)
    steps = Steps(
        spec,
        device,
        num_sequences=max(scale.batches),
        context=scale.context,
        is_exact=is_exact,
        temperature=temperature,
    )
    for number in range(max(scale.batches)):
        steps.prefill(number)
    figures: Figures = {"backend": steps.backend}
    for batch in scale.batches:
        step_s = clock.median_s(partial(steps.decode, batch))
        read = step_bytes(spec, batch, scale.context)
        figures[str(batch)] = {
            "step_ms": step_s * 1e3,
            "tokens_per_s": batch / step_s,
            "bandwidth_share": read / step_s / limits["bytes_per_s"],
            **_gap(device, partial(steps.decode, batch)),
        }
        print(f"batch {batch}: {figures[str(batch)]}", flush=True)
    return figures


def _gap(device: torch.device, work: Callable[[], object]) -> Figures:
    """How much of some steps' time no kernel ran, and what ran longest, by torch's profiler."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall_s = sum(Clock(device, 1).once_s(work) for _ in range(_PROFILED_STEPS))
    kernels = [(x.self_device_time_total, x.count, x.key[:60]) for x in profiler.key_averages()]
    if not kernels:
        return {"gap_share_profiled": "the profiler saw no kernel"}
    kernels_s = sum(time_us for time_us, _, _ in kernels) * 1e-6
    return {
        "gap_share_profiled": max(0.0, 1 - kernels_s / wall_s),
        "longest_us": {  # of a step: all launches of a kernel, and how many they are
            name: [round(time_us / _PROFILED_STEPS, 1), count // _PROFILED_STEPS]
            for time_us, count, name in sorted(kernels, reverse=True)[:_NUM_LONGEST]
        },
    }


def products(
    device: torch.device,
    scale: Scale,
    shape: str,
    limits: Mapping[str, float],
    *,
    is_exact: bool,
) -> Figures:
    """What each product of a layer makes of the bandwidth, by its outputs x inputs and batch."""
    if is_exact:
        prepare(device)
    spec, clock, figures = SHAPES[shape], Clock(device, scale.num_steps), Figures()
    for out, into in product_shapes(spec):
        # As many as a layer after the other would meet: none is still in the cache.
        count = max(2, min(20, _COLD_BYTES // (out * into * spec.dtype.itemsize)))
        weights = [torch.randn(out, into, dtype=spec.dtype, device=device) for _ in range(count)]
        linears = [make_linear(weight) for weight in weights]
        figures[f"{out}x{into}"] = shares = {}
        for batch in scale.batches:
            x = torch.randn(batch, into, dtype=spec.dtype, device=device)
            x = pad_rows(x, linears[0].row_multiple)
            seconds = clock.median_s(partial(_multiply, x, linears)) / count
            read = out * into * spec.dtype.itemsize
            shares[str(batch)] = read / seconds / limits["bytes_per_s"]
        print(f"{out} x {into}: {shares}", flush=True)
        del weights, linears
    return figures


def _multiply(x: Tensor, linears: Sequence[Linear]) -> None:
    for linear in linears:
        linear(x)


def prefill(
    device: torch.device,
    scale: Scale,
    shape: str,
    limits: Mapping[str, float],
    *,
    is_exact: bool = True,
) -> Figures:
    """Tokens/s of one prompt, by its length."""
    spec, figures = SHAPES[shape], {}
    for length in scale.prompts:
        steps = Steps(spec, device, num_sequences=1, context=length, is_exact=is_exact)
        prompt_s = Clock(device, max(2, scale.num_steps // 4)).median_s(partial(steps.prefill, 0))
        share = prefill_operations(spec, length) / prompt_s / limits["operations_per_s"]
        figures[str(length)] = {
            "first_token_ms": prompt_s * 1e3,
            "tokens_per_s": length / prompt_s,
            "operations_share": share,
        }
        print(f"{length} tokens: {figures[str(length)]}", flush=True)
        del steps
    return figures


def switch(device: torch.device, shape: str, limits: Mapping[str, float]) -> Figures:
    """Seconds from weights in host memory to a model on the device."""
    spec = SHAPES[shape]

    class Zeros(WeightSource):
        """No files: what the numbers are does not matter to a copy."""

        def open(self) -> Any:
            shapes = self.part_shapes

            class Opened:
                def __enter__(self) -> Callable[[str], Tensor]:
                    return lambda name: torch.zeros((), dtype=spec.dtype).expand(shapes[name])

                def __exit__(self, *_: object) -> None:
                    pass

            return Opened()

    known = cast(KnownModel, SimpleNamespace(spec=spec, whole_spec=spec))
    config = EngineConfig(models=(("m", "m"),), device=str(device))
    weights = HostWeights(Zeros(known, device, config, ALONE))
    clock = Clock(device, 3)
    seconds = clock.median_s(weights.on_device)
    num_bytes = num_multiplied(spec) * spec.dtype.itemsize
    rate = num_bytes / seconds
    return {"switch_ms": seconds * 1e3, "host_rate_share": rate / limits["host_bytes_per_s"]}
