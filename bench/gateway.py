"""What a gateway adds: Headway's beside LiteLLM's proxy, sglang-router and LitServe.

One client, one run, one after the other: chats of one token (requests/s, CPU a request), streams
paced as by a GPU (CPU a token), and streams one at a time (time to first token, less than that of
the fake server asked directly). CPU is that of the gateway's processes with all that they start;
for Headway of gateway and scheduler, once with the core interpreted and once compiled by mypyc, for
LitServe of all of it, as its engine is inside. Engines' CPU stands beside it. Ends with one line of
JSON.
"""

import argparse
import json
import time
from functools import partial

import uvloop

from bench.figures import percentile
from bench.gateway_client import run_load
from bench.gateway_fake import FAST, PACED
from bench.gateway_peers import TARGETS, Target, tree_cpu_s

WARM_S = 2.0
TTFT_TOKENS = 2

Figures = dict[str, dict[str, float | str]]
"""By gateway; one that did not start has a reason and nothing else."""


class Clock:
    """CPU and wall time of a target since the start of a phase."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._gateway_s = tree_cpu_s(target.gateway_pids)
        self._engine_s = tree_cpu_s(target.engine_pids)
        self._wall_s = time.perf_counter()

    def read(self, number: int, unit: str) -> dict[str, float]:
        """CPU microseconds for each of ``number`` things, and how many there were a second."""
        wall_s = time.perf_counter() - self._wall_s
        gateway_s = tree_cpu_s(self._target.gateway_pids) - self._gateway_s
        engine_s = tree_cpu_s(self._target.engine_pids) - self._engine_s
        return {
            f"{unit}s_per_s": round(number / wall_s, 1),
            f"us_per_{unit}": round(1e6 * gateway_s / number, 1),
            f"engine_us_per_{unit}": round(1e6 * engine_s / number, 1),
        }


async def measure(target: Target, arguments: argparse.Namespace) -> dict[str, float]:
    url, seconds = target.url, arguments.seconds
    ask = partial(run_load, url)
    plain = partial(ask, FAST, clients=arguments.clients, num_tokens=1, is_streaming=False)
    await plain(seconds=min(WARM_S, seconds))
    clock = Clock(target)
    load = await plain(seconds=seconds)
    figures = clock.read(load.num_answers, "request")

    num_tokens = arguments.tokens
    paced = partial(ask, PACED, clients=arguments.streams, num_tokens=num_tokens, is_streaming=True)
    await paced(seconds=min(WARM_S, seconds))
    clock = Clock(target)
    load = await paced(seconds=seconds)
    figures |= clock.read(load.num_answers * num_tokens, "token")

    load = await ask(FAST, clients=1, num_tokens=TTFT_TOKENS, is_streaming=True, seconds=seconds)
    times = sorted(load.first_text_s)
    figures["ttft_ms_p50"] = round(1000 * percentile(times, 0.5), 2)
    figures["ttft_ms_p99"] = round(1000 * percentile(times, 0.99), 2)
    return figures


def add_latency(figures: Figures) -> None:
    """What each gateway adds to the first token."""
    direct = figures["direct"]
    for name, row in figures.items():
        if "reason" not in row and name != "direct":
            for part in ("p50", "p99"):
                row[f"ttft_added_ms_{part}"] = round(
                    float(row[f"ttft_ms_{part}"]) - float(direct[f"ttft_ms_{part}"]), 2
                )


def multiples(figures: Figures, of: str) -> dict[str, dict[str, float]]:
    """The costs of each gateway as multiples of those of one; empty if that one did not start."""
    ours = figures.get(of, {"reason": ""})
    return {
        name: {
            key: round(float(row[key]) / float(ours[key]), 2)
            for key in ("us_per_request", "us_per_token")
        }
        for name, row in figures.items()
        if name != "direct" and "reason" not in row and "reason" not in ours
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), help="beside direct, headway")
    parser.add_argument("--clients", type=int, default=32, help="one-token chats at once")
    parser.add_argument("--streams", type=int, default=16, help="paced streams at once")
    parser.add_argument("--tokens", type=int, default=128, help="of a paced stream")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each part")
    arguments = parser.parse_args()
    wanted = TARGETS if arguments.only is None else {"direct", "headway", *arguments.only}
    figures: Figures = {}
    for name, start in TARGETS.items():
        if name not in wanted:
            continue
        try:
            with start() as target:
                figures[name] = dict(uvloop.run(measure(target, arguments)))
        except (RuntimeError, OSError, ExceptionGroup, SystemExit) as error:
            if name in ("direct", "headway"):
                raise
            figures[name] = {"reason": repr(error)[-300:]}
        print(name, figures[name], flush=True)
    add_latency(figures)
    ratios = {f"times_{ours}": multiples(figures, ours) for ours in ("headway", "headway_compiled")}
    print(json.dumps({"bench": "gateway", "peers": figures, **ratios}))


if __name__ == "__main__":
    main()
