"""Steps of the engine's own runner, without the queue before it, and a clock for them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.gpu.shapes import BUDGET, random_tensors
from executor_svc.core.batcher import Chunk
from executor_svc.core.engine import SamplingParams
from executor_svc.core.sequence import Sequence
from executor_svc.core.stopping import StopRules
from executor_svc.torch_engine.attention.choice import choose_backend, make_attention
from executor_svc.torch_engine.config import EngineConfig, ModelSpec
from executor_svc.torch_engine.exactness import prepare
from executor_svc.torch_engine.models.decoder import Decoder
from executor_svc.torch_engine.runner import Runner
from executor_svc.torch_engine.sampler import Row

_BLOCK = 16


class Clock:
    """Times work on one device."""

    def __init__(self, device: torch.device, num_steps: int) -> None:
        self._device, self._num_steps = device, num_steps

    def once_s(self, work: Callable[[], object]) -> float:
        self._wait()
        started_s = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started_s

    def median_s(self, work: Callable[[], object]) -> float:
        """After two runs that do not count."""
        for _ in range(2):
            work()
        return statistics.median(self.once_s(work) for _ in range(self._num_steps))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Steps:
    """A runner with a random model and ``num_sequences`` texts of ``context`` tokens."""

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        *,
        num_sequences: int,
        context: int,
        is_exact: bool = True,
        temperature: float = 0.0,
    ) -> None:
        """``is_exact`` holds for the whole process: cuBLAS is set up once."""
        blocks_each = -(-context // _BLOCK)
        num_blocks = num_sequences * blocks_each
        config = EngineConfig(
            models=(("m", "m"),),
            device=str(device),
            max_num_seqs=num_sequences,
            max_num_batched_tokens=max(BUDGET, num_sequences),
            max_model_len=context,
            block_size=_BLOCK,
            exact_mode=is_exact,
        )
        name = choose_backend(config, device, {spec.dtype})
        config = replace(config, attention_backend=name)
        if is_exact:
            prepare(device)
        self.model = Decoder(spec, random_tensors(spec, device), device)
        attention = make_attention(spec, config, num_blocks=num_blocks, device=device)
        self.backend = attention.numerics
        self._runner = Runner(
            self.model,
            attention,
            block_size=_BLOCK,
            device=device,
            graphs_up_to=num_sequences
            if attention.supports_graphs and device.type == "cuda"
            else 0,
        )
        # Cuts as many a client asks for; they cost nothing at temperature 0.
        params = SamplingParams(
            max_tokens=1, temperature=temperature, top_k=20, top_p=0.95, ignore_eos=True
        )
        self._row = Row.of(params, 0, ())
        self._sequences = [
            Sequence(
                key=i,
                lease_key=i,
                sample=0,
                params=params,
                stops=StopRules(1, 0, frozenset(), None),
                token_ids=[(7919 * j + i) % spec.vocab_size for j in range(context)],
                num_prompt_tokens=context,
                block_table=list(range(i * blocks_each, (i + 1) * blocks_each)),
            )
            for i in range(num_sequences)
        ]
        self._context = context

    def prefill(self, number: int) -> None:
        """The whole text of one sequence, in chunks of the budget."""
        for start in range(0, self._context, BUDGET):
            count = min(BUDGET, self._context - start)
            is_last = start + count == self._context
            chunk = Chunk(self._sequences[number], start, count, is_last)
            self._runner.launch([chunk], [self._row]).result()

    def decode(self, batch: int) -> None:
        """The last token of so many texts."""
        chunks = [Chunk(s, self._context - 1, 1, True) for s in self._sequences[:batch]]
        self._runner.launch(chunks, [self._row] * batch).result()
