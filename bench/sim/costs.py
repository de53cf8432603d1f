"""What work costs on a modelled executor, in milliseconds.

Rule: one step of a batch of n sequences takes ``step_ms + sequence_ms x n``, prefill takes
``prefill_ms`` for each prompt token. Every constant names its source; nothing here was tuned to
make a policy look good.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost model of one kind of executor."""

    step_ms: float
    sequence_ms: float
    prefill_ms: float
    # most prompt tokens that one step takes in (step model only)
    chunk_tokens: int = 2048

    def token_ms(self, batch: int) -> float:
        """Time between two tokens of each of ``batch`` sequences."""
        return self.step_ms + self.sequence_ms * batch

    def service_ms(self, num_prompt_tokens: int, num_output_tokens: int, batch: int) -> float:
        """A request's time in a slot while ``batch`` sequences run."""
        return num_prompt_tokens * self.prefill_ms + num_output_tokens * self.token_ms(batch)


PROFILES = {
    # executor_svc/mock_engine.py, MockConfig: step_ms 20, one token a step, prefill for nothing.
    "mock": Costs(step_ms=20.0, sequence_ms=0.0, prefill_ms=0.0),
    # bench/sim/calibrate.py, the torch engine with the built-in model on one thread of a CPU.
    "cpu-builtin": Costs(step_ms=3.1, sequence_ms=0.03, prefill_ms=0.034),
    # The same from the steps of an executor at work, Qwen3-0.6B's shape in bfloat16 on two cores.
    "cpu-0.6b": Costs(step_ms=57.8, sequence_ms=4.44, prefill_ms=1.85),
    # Llama-3.1-8B in bfloat16 on an H100, as published for vLLM 0.21: 6.48 ms from token to token
    # with 1 stream, 10.94 ms with 16; prefill 55.5k tokens/s is the limit, 60 % of it our target.
    "h100-8b": Costs(step_ms=6.18, sequence_ms=0.297, prefill_ms=0.03),
}
