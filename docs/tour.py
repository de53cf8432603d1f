"""A tour of a running Headway (`make run` in another terminal) with the SDKs that people use.

Each stop prints what it does and what came back; the last one starts two executors of its own
and kills one of them in the middle of a stream.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

os.environ.setdefault("TINKER_TELEMETRY", "0")

import grpc
import httpx
import openai
import tinker
from tokenizers import Tokenizer

from headway.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc

Stub: TypeAlias = Any  # the generated types are those of asyncio's stubs only

TOUR_MODEL = "headway/tour"
PROMPT = "The json module"
DIM, BOLD, PLAIN = ("\033[2m", "\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


def stop(number: int, title: str) -> None:
    print(f"\n{BOLD}{number}. {title}{PLAIN}", flush=True)


def say(text: str) -> None:
    print(f"   {text}", flush=True)


def show_models(gateway: str) -> str:
    """What is there; gives the name of the first model."""
    stop(1, "What is there")
    say(f"GET /health -> {httpx.get(f'{gateway}/health').status_code}")
    models = httpx.get(f"{gateway}/v1/models").json()["data"]
    say(f"GET /v1/models -> {[model['id'] for model in models]}")
    names = [model["id"] for model in models if model["id"] != TOUR_MODEL]
    return str(names[0])


def stream_openai(gateway: str, model: str) -> None:
    """A chat and a completion, streamed by the openai SDK."""
    stop(2, "The openai SDK streams a chat and a completion")
    client = openai.OpenAI(base_url=f"{gateway}/v1", api_key="none")
    print("   ", end="")
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What does json.dumps do?"}],
        max_tokens=80,
        temperature=0.3,
        seed=1,
        stream=True,
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print(f"\n   {DIM}--{PLAIN}\n   ", end="")
    for part in client.completions.create(
        model=model, prompt=PROMPT, max_tokens=60, temperature=0.3, seed=1, stream=True
    ):
        print(part.choices[0].text.replace("\n", " "), end="", flush=True)
    print()


def sample_tinker(gateway: str, model: str, tokenizer: Tokenizer) -> None:
    """Four samples by the Tinker SDK, twice with one seed."""
    stop(3, f"The tinker {tinker.__version__} SDK draws n=4 with a seed and a stop string")
    service = tinker.ServiceClient(base_url=gateway, api_key="tml-tour")
    sampler = service.create_sampling_client(base_model=model).result()
    params = tinker.SamplingParams(max_tokens=24, temperature=0.6, seed=7, stop=["."])
    prompt = tokenizer.encode(PROMPT).ids
    runs = []
    for _ in range(2):
        future = sampler.sample(
            prompt=tinker.ModelInput.from_ints(prompt), num_samples=4, sampling_params=params
        )
        runs.append([list(sequence.tokens) for sequence in future.result().sequences])
    for tokens in runs[0]:
        say(f"{len(tokens):3} tokens: {PROMPT}{tokenizer.decode(tokens)}".replace("\n", " "))
    say(f"the same seed again gives the same four samples: {runs[0] == runs[1]}")


def call_grpc(stub: Stub, request: generation_pb2.GenerationRequest) -> None:
    """Generate streams; Submit + Retrieve is a future."""
    stop(4, "A plain gRPC client: Generate, then Submit + Retrieve")
    num_tokens, num_messages = 0, 0
    for message in stub.Generate(scheduler_pb2.GenerateRequest(request=request)):
        num_tokens += len(message.frame.token_id)
        num_messages += 1
    say(f"Generate: {num_tokens} tokens in {num_messages} messages")
    future = stub.Submit(scheduler_pb2.SubmitRequest(request=request))
    say(f"Submit: {future.request_id}")
    ask = scheduler_pb2.RetrieveRequest(request_id=future.request_id)
    ask.wait.FromSeconds(30)
    result = stub.Retrieve(ask).result
    timing = result.timing
    say(
        f"Retrieve: {len(result.samples[0].token_ids)} tokens, queued "
        f"{timing.queued.ToMilliseconds()} ms, first token {timing.first_token.ToMilliseconds()} "
        f"ms, total {timing.total.ToMilliseconds()} ms"
    )


def watch_queue(stub: Stub, request: generation_pb2.GenerationRequest, num_requests: int) -> None:
    """More long requests than slots, and the last one counting down."""
    stop(5, f"A queue: the last of {num_requests} requests counts down to its turn")
    request.sampling.ignore_eos = True
    futures = []
    for number in range(num_requests):
        request.sampling.max_tokens = 40 + number * 7 % 160
        futures.append(stub.Submit(scheduler_pb2.SubmitRequest(request=request)).request_id)
    ask = scheduler_pb2.RetrieveRequest(request_id=futures[-1])
    last = None
    while (answer := stub.Retrieve(ask)).HasField("pending"):
        status = answer.pending
        if status.state == generation_pb2.QueueStatus.STATE_WAITING and status.position != last:
            last = status.position
            eta = f"{status.estimated_wait.ToMilliseconds() / 1000:.1f} s"
            say(
                f"position {status.position} of {status.depth}, "
                f"expected wait {eta if status.HasField('estimated_wait') else 'unknown'}"
            )
        time.sleep(0.5)
    say("its result is there")


@contextmanager
def own_executors(scheduler: str, folder: Path) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """Two executors that serve the built-in model under the tour's own name."""
    binary = Path(sys.executable).parent / "headway-executor"
    executors = {}
    for name in ("tour-a", "tour-b"):
        arguments = ["--executor-id", name, "--model-name", TOUR_MODEL]
        with (folder / f"{name}.log").open("wb") as log:
            executors[name] = subprocess.Popen(
                [binary, *arguments, "--scheduler-addresses", scheduler], stderr=log
            )
    try:
        yield executors
    finally:
        for process in executors.values():
            process.terminate()
        for process in executors.values():
            process.wait(30)


def kill_one(scheduler: str, channel: grpc.Channel, prompt: list[int]) -> bool:
    """Kill -9 the executor of a running stream; the stream goes on from the other one."""
    stop(6, "kill -9 of an executor in the middle of a stream")
    # the generated types know channels of grpc.aio only
    stub: Stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)  # type: ignore[arg-type]
    admin: Stub = scheduler_pb2_grpc.AdminServiceStub(channel)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder, own_executors(scheduler, Path(folder)) as mine:
        wait_until(lambda: len(running(admin, mine)) == 2, "both executors are attached")
        request = generation_pb2.GenerationRequest(
            model=TOUR_MODEL,
            prompt_token_ids=prompt,
            sampling=generation_pb2.SamplingParams(max_tokens=600, seed=3, ignore_eos=True),
        )
        indexes: list[int] = []
        finished = scheduler_pb2.Finished()
        victim = None
        for message in stub.Generate(scheduler_pb2.GenerateRequest(request=request)):
            indexes.extend(message.frame.index)
            finished = message.finished
            if victim is None and len(indexes) > 100:
                leased = {name: row.num_leased for name, row in running(admin, mine).items()}
                victim = max(leased, key=lambda name: leased[name])
                mine[victim].kill()
                say(f"after {len(indexes)} tokens: killed {victim}")
        is_whole = indexes == list(range(600)) and not finished.HasField("failure")
        say(
            f"the stream went on: {len(indexes)} tokens, each index once and in order: {is_whole}; "
            f"attempts: {finished.timing.num_attempts}"
        )
        return is_whole


def running(
    admin: Stub, mine: dict[str, "subprocess.Popen[bytes]"]
) -> dict[str, scheduler_pb2.ExecutorRow]:
    snapshot = admin.GetSnapshot(scheduler_pb2.GetSnapshotRequest()).snapshot
    return {row.executor_id: row for row in snapshot.executors if row.executor_id in mine}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"gave up waiting until {what}")
        time.sleep(0.2)
    say(what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", default="http://127.0.0.1:8080", help="its base URL")
    parser.add_argument("--scheduler", default="127.0.0.1:50051", help="its host:port")
    parser.add_argument("--requests", type=int, default=150, help="in the queue that is watched")
    arguments = parser.parse_args()
    try:
        model = show_models(arguments.gateway)
    except (httpx.HTTPError, LookupError) as error:
        sys.exit(f"no Headway answers at {arguments.gateway} ({error}); start one with: make run")
    stream_openai(arguments.gateway, model)
    with grpc.insecure_channel(arguments.scheduler) as channel:
        # as in kill_one
        stub: Stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)  # type: ignore[arg-type]
        card = stub.GetModel(scheduler_pb2.GetModelRequest(model=model))
        tokenizer = Tokenizer.from_str(card.assets.tokenizer_json.decode())
        prompt = tokenizer.encode(PROMPT).ids
        sample_tinker(arguments.gateway, model, tokenizer)
        request = generation_pb2.GenerationRequest(
            model=model,
            prompt_token_ids=prompt,
            sampling=generation_pb2.SamplingParams(max_tokens=40, temperature=0.7),
        )
        call_grpc(stub, request)
        watch_queue(stub, request, arguments.requests)
        is_whole = kill_one(arguments.scheduler, channel, prompt)
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
