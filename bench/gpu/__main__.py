"""Is the engine right on this GPU, and how far is it from what the GPU can do?

    python -m bench.gpu                          all parts that 9 minutes have room for
    python -m bench.gpu --part decode:qwen3-8b   some of them, one after the other
    python -m bench.gpu --device cpu --quick     the same code on tiny shapes, for tests

Needs torch, triton, numpy, safetensors and tokenizers; transformers is compared where it is there.
Weights are random and made on the spot. Each part is a process of its own with a limit on its time:
one that fails, hangs or breaks the device is reported, and the others go on. Those that tell most
come first; what is left when the time is up is reported as skipped.

- ``ceilings``: bandwidth and products of this device, which all shares below refer to;
- ``attention``: every backend against its definition; the Triton one also alone and replayed;
- ``rows``: does a row of a product keep its bits for every number of rows up to that of a full
  step, and for each size of CUDA graph, with cuBLAS set as exact mode sets it;
- ``products:<shape>``: each product of a layer at each batch size, as a share of the bandwidth that
  reading its weight once would take; ``products-loose:<shape>`` with cuBLAS left as it is;
- ``decode:<shape>``, ``prefill:<shape>``: tokens/s of steps of the engine's own runner, sampling
  included, and their share of the ceilings; for decode also what of a step no kernel runs, and
  which kernels the time goes to;
- ``decode-drawn:<shape>``: the same decode steps with temperature, top_k 20 and top_p 0.95: what
  drawing costs beside taking the likeliest token;
- ``decode-loose:<shape>``, ``prefill-loose:<shape>``: without exact mode, so with the attention
  and the products that are fastest; ``price_of_exactness`` is exact milliseconds over these;
- ``switch``: an 8B model from locked host memory to the device;
- ``engine``: requests through the whole engine, and with each step waited for before the next one
  is planned; ``transformers``: the same through its continuous batching.

Decode must read all weights and all keys and values once, prefill must do two operations for each
weight and token, and its attention half of a full one: the shares are these over what was measured
in ``ceilings``. The last line is JSON, with every part's figures, or why it has none; ``--out``
has the same after each part, for who is stopped before the end.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from bench.arguments import parser_of
from bench.gpu.requests import engine, transformers
from bench.gpu.right import attention, rows
from bench.gpu.shapes import QUICK, Figures, Scale
from bench.gpu.speed import ceilings, decode, prefill, products, switch

_LEAST_S = 5  # for a part to be worth its start


def parts(*, is_quick: bool) -> dict[str, int]:
    """All parts, those first that tell most, with their limits in seconds."""
    shapes = ("tiny",) if is_quick else ("qwen3-8b", "qwen3-0.6b")
    limits = {"ceilings": 90, "attention": 180}
    for kind in ("decode", "prefill"):
        limits |= {f"{kind}:{shape}": 150 for shape in shapes}
    limits |= {f"decode-drawn:{shapes[-1]}": 150, f"products:{shapes[0]}": 90}
    limits |= {"engine": 150, "transformers": 120, "switch": 120}
    for kind in ("decode-loose", "prefill-loose"):
        limits |= {f"{kind}:{shape}": 150 for shape in shapes}
    return limits | {f"products-loose:{shapes[0]}": 90, "rows": 180}


def run_part(name: str, device: torch.device, scale: Scale, limits: Mapping[str, float]) -> Figures:
    """One part, in this process."""
    kind, _, shape = name.partition(":")
    is_tiny = scale is QUICK
    with torch.inference_mode():
        match kind:
            case "ceilings":
                return ceilings(device, scale)
            case "attention":
                return attention(device, scale)
            case "rows":
                return rows(device, scale)
            case "products" | "products-loose":
                return products(device, scale, shape, limits, is_exact=kind == "products")
            case "decode" | "decode-loose":
                return decode(device, scale, shape, limits, is_exact=kind == "decode")
            case "decode-drawn":
                return decode(device, scale, shape, limits, temperature=1.0)
            case "prefill" | "prefill-loose":
                return prefill(device, scale, shape, limits, is_exact=kind == "prefill")
            case "switch":
                return switch(device, "tiny" if is_tiny else "qwen3-8b", limits)
            case "engine":
                return engine(device, scale, "tiny" if is_tiny else "qwen3-0.6b")
            case "transformers":
                return transformers(device, scale, "tiny" if is_tiny else "qwen3-0.6b")
            case _:
                raise ValueError(f"no part is called {name!r}")


def in_process(name: str, limit_s: int, options: list[str], limits: Mapping[str, float]) -> Figures:
    """One part in a process of its own: its figures, or why there are none."""
    command = [sys.executable, "-m", "bench.gpu", "--part", name, *options]
    try:
        done = subprocess.run(
            [*command, "--limits", json.dumps(limits)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        print((expired.stdout or b"").decode(errors="replace"), flush=True)
        return {"failed": f"ran longer than {limit_s} s; what it said is above"}
    lines = done.stdout.splitlines()
    print("\n".join(lines[:-1]), flush=True)
    if done.returncode != 0 or not lines:
        print("\n".join(lines[-1:]), flush=True)
        return {"failed": f"exit status {done.returncode}; its error is above"}
    return cast(Figures, json.loads(lines[-1]))


def price_of_exactness(report: Mapping[str, Figures]) -> Figures:
    """By part and size, how many times as long a step or a prompt takes in exact mode."""
    prices: Figures = {}
    for name, loose in report.items():
        kind, _, shape = name.partition(":")
        exact = report.get(f"{kind.removesuffix('-loose')}:{shape}", {})
        if not kind.endswith("-loose") or kind.startswith("products"):
            continue
        field = "step_ms" if kind.startswith("decode") else "first_token_ms"
        prices[f"{kind.removesuffix('-loose')}:{shape}"] = {
            size: exact[size][field] / figures[field]
            for size, figures in loose.items()
            if size.isdigit() and size in exact
        }
    return prices


def main() -> None:
    """Print progress, and all figures as JSON at the end."""
    parser = parser_of("bench.gpu", __doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script itself")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for tests")
    parser.add_argument("--part", action="append", help="one part only; may be repeated")
    parser.add_argument("--budget-s", type=float, default=540, help="no part runs past it")
    parser.add_argument("--out", type=Path, help="file for the figures, written after each part")
    parser.add_argument("--limits", help="run one part here, with these figures of ceilings")
    arguments = parser.parse_args()
    device, scale = torch.device(arguments.device), QUICK if arguments.quick else Scale()
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick tries the script itself")
    if arguments.limits is not None:
        (part,) = arguments.part
        print(json.dumps(run_part(part, device, scale, json.loads(arguments.limits))))
        return
    chosen = parts(is_quick=arguments.quick)
    if arguments.part:
        # All others refer to the ceilings.
        chosen = {name: chosen.get(name, 300) for name in ("ceilings", *arguments.part)}
    if not report(device, chosen, arguments):
        sys.exit(1)


def report(device: torch.device, chosen: Mapping[str, int], arguments: argparse.Namespace) -> bool:
    """Run parts one after the other; gives whether all is well."""
    ends_s = time.monotonic() + arguments.budget_s
    options = ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    figures: dict[str, Figures] = {}
    whole: Figures = {"bench": "gpu", "device": name, "torch": torch.__version__, "parts": figures}
    for part, most_s in chosen.items():
        limit_s = min(most_s, round(ends_s - time.monotonic()))
        if limit_s < _LEAST_S:
            figures[part] = {"skipped": "no time was left"}
            print(f"== {part}: no time was left", flush=True)
            continue
        print(f"== {part}, at most {limit_s} s", flush=True)
        started_s = time.monotonic()
        figures[part] = in_process(part, limit_s, options, figures.get("ceilings", {}))
        took_s = time.monotonic() - started_s
        print(f"   {took_s:.0f} s: {json.dumps(figures[part])}", flush=True)
        whole["price_of_exactness"] = price_of_exactness(figures)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(whole))
    print(json.dumps(whole))
    return not any("failed" in part or part.get("is_same") is False for part in figures.values())


if __name__ == "__main__":
    main()
