"""What a gateway adds: Headway's beside LiteLLM's proxy, sglang-router and LitServe.

One client, one run. All are up, and each is asked by itself for a slice of a few seconds, in turns,
since a machine's speed changes by the minute. A round has three parts: chats of one token
(requests/s, CPU a request), streams paced as by a GPU (CPU a token), and streams one at a time
(time to first token, also less than that of the fake server asked directly). Every other round
goes backwards. CPU is that of the gateway's processes with all that they start; for Headway of
gateway and scheduler, once with the core interpreted and once compiled by mypyc, for LitServe of
all of it, as its engine is inside. Engines' CPU stands beside it.

Ends with one line of JSON: medians over the rounds, and under ``times_headway`` and
``times_headway_compiled`` the costs of each as multiples of Headway's in the same round: median,
least and greatest of the rounds.
"""

import argparse
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import uvloop

from bench.arguments import parser_of
from bench.figures import percentile
from bench.gateway_client import run_load
from bench.gateway_fake import FAST, PACED
from bench.gateway_peers import TARGETS, Target, tree_cpu_s

TTFT_TOKENS = 2
OURS = ("headway", "headway_compiled")
COSTS = ("us_per_request", "us_per_token")
NEEDED = ("direct", "headway")
FAILURES = (RuntimeError, OSError, ExceptionGroup, SystemExit)

Figures = dict[str, float]
Part = Callable[[Target, argparse.Namespace], Awaitable[Figures]]


class Clock:
    """CPU and wall time of a target since the start of a slice."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._gateway_s = tree_cpu_s(target.gateway_pids)
        self._engine_s = tree_cpu_s(target.engine_pids)
        self._wall_s = time.perf_counter()

    def read(self, number: int, unit: str) -> Figures:
        """CPU microseconds for each of ``number`` things, and how many there were a second."""
        wall_s = time.perf_counter() - self._wall_s
        gateway_s = tree_cpu_s(self._target.gateway_pids) - self._gateway_s
        engine_s = tree_cpu_s(self._target.engine_pids) - self._engine_s
        return {
            f"{unit}s_per_s": number / wall_s,
            f"us_per_{unit}": 1e6 * gateway_s / number,
            f"engine_us_per_{unit}": 1e6 * engine_s / number,
        }


async def requests(target: Target, arguments: argparse.Namespace) -> Figures:
    """Chats of one token, many at once."""
    clock = Clock(target)
    ask = partial(run_load, target.url, FAST, seconds=arguments.seconds)
    load = await ask(clients=arguments.clients, num_tokens=1, is_streaming=False)
    return clock.read(load.num_answers, "request")


async def tokens(target: Target, arguments: argparse.Namespace) -> Figures:
    """Paced streams, each to its end."""
    clock, num_tokens = Clock(target), arguments.tokens
    ask = partial(run_load, target.url, PACED, seconds=arguments.seconds)
    load = await ask(clients=arguments.streams, num_tokens=num_tokens, is_streaming=True)
    return clock.read(load.num_answers * num_tokens, "token")


async def first_token(target: Target, arguments: argparse.Namespace) -> Figures:
    """Streams one at a time."""
    ask = partial(run_load, target.url, FAST, seconds=arguments.seconds)
    load = await ask(clients=1, num_tokens=TTFT_TOKENS, is_streaming=True)
    times = sorted(load.first_text_s)
    return {
        "ttft_ms_p50": 1000 * percentile(times, 0.5),
        "ttft_ms_p99": 1000 * percentile(times, 0.99),
    }


PARTS: tuple[Part, ...] = (requests, tokens, first_token)


@dataclass(slots=True)
class Contender:
    """One of those compared; a peer that fails has a reason, and is asked no more."""

    name: str
    target: Target | None = None
    rounds: list[Figures] = field(default_factory=list)
    reason: str = ""

    def fail(self, error: BaseException) -> None:
        if self.name in NEEDED:
            raise error
        self.reason = repr(error)[-300:]
        print(f"{self.name}: {self.reason}", flush=True)


def started(name: str, exits: ExitStack) -> Contender:
    """Up until the exits close, or with a reason why not."""
    contender = Contender(name)
    try:
        contender.target = exits.enter_context(TARGETS[name]())
        print(f"{name} is up", flush=True)
    except FAILURES as error:
        contender.fail(error)
    return contender


async def compare(contenders: list[Contender], arguments: argparse.Namespace) -> None:
    """All rounds. One before them is not counted: first requests load code."""
    for number in range(arguments.rounds + 1):
        for contender in contenders:
            contender.rounds.append({})
        for part in PARTS:
            for contender in contenders[:: -1 if number % 2 else 1]:
                await ask(contender, part, arguments)
        print(f"round {number} of {arguments.rounds}" if number else "warm", flush=True)
    for contender in contenders:
        del contender.rounds[0]


async def ask(contender: Contender, part: Part, arguments: argparse.Namespace) -> None:
    """One slice of a contender's round."""
    if contender.reason:
        return
    assert contender.target is not None
    try:
        found = await part(contender.target, arguments)
    except FAILURES as error:
        contender.fail(error)
        return
    contender.rounds[-1] |= found
    said = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
    print(f"{contender.name}: {said}", flush=True)


def add_latency(rounds: list[Figures], direct: list[Figures]) -> None:
    """What a gateway adds to the first token, in each round."""
    for ours, theirs in zip(rounds, direct, strict=True):
        for share in ("p50", "p99"):
            key = f"ttft_ms_{share}"
            ours[f"ttft_added_ms_{share}"] = ours[key] - theirs[key]


def medians(rounds: list[Figures]) -> Figures:
    return {key: round(median(one[key] for one in rounds), 2) for key in rounds[0]}


def multiples(rounds: list[Figures], ours: list[Figures]) -> dict[str, Figures]:
    """Costs as multiples of ours in the same round."""
    found = {}
    for cost in COSTS:
        ratios = [one[cost] / our[cost] for one, our in zip(rounds, ours, strict=True)]
        spread = {"median": median(ratios), "least": min(ratios), "greatest": max(ratios)}
        found[cost] = {key: round(ratio, 2) for key, ratio in spread.items()}
    return found


def summary(contenders: list[Contender]) -> Mapping[str, object]:
    """By contender: figures or a reason; and the multiples of those of ours that are there."""
    whole = {one.name: one.rounds for one in contenders if not one.reason}
    for name, rounds in whole.items():
        if name != "direct":
            add_latency(rounds, whole["direct"])
    peers: dict[str, object] = {one.name: {"reason": one.reason} for one in contenders}
    peers |= {name: medians(rounds) for name, rounds in whole.items()}
    ratios = {
        f"times_{ours}": {
            name: multiples(rounds, whole[ours])
            for name, rounds in whole.items()
            if name != "direct"
        }
        for ours in OURS
        if ours in whole
    }
    return {"bench": "gateway", "peers": peers, **ratios}


def main() -> None:
    parser = parser_of("bench.gateway", __doc__)
    add = parser.add_argument
    add("--only", nargs="*", choices=list(TARGETS), help="beside direct, headway")
    add("--clients", type=int, default=32, help="one-token chats at once")
    add("--streams", type=int, default=16, help="paced streams at once")
    add("--tokens", type=int, default=128, help="of a paced stream")
    add("--seconds", type=float, default=1.0, help="least length of each slice")
    add("--rounds", type=int, default=8, help="after one that does not count")
    arguments = parser.parse_args()
    wanted = TARGETS if arguments.only is None else {*NEEDED, *arguments.only}
    with ExitStack() as exits:
        contenders = [started(name, exits) for name in TARGETS if name in wanted]
        uvloop.run(compare(contenders, arguments))
    print(json.dumps(summary(contenders)))


if __name__ == "__main__":
    main()
