"""What an answer cost, and where its time went, summed over its prompts."""

from typing import Any

from google.protobuf import duration_pb2

from gateway_http.client import Finish


class Outcome:
    """Grows with every prompt that ends. ``num_hidden`` tokens of each were not shown."""

    def __init__(self, num_hidden: int = 0) -> None:
        self._num_hidden = num_hidden
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        self.num_reasoning_tokens = 0
        self._finishes: dict[int, Finish] = {}

    def add(self, number: int, finish: Finish) -> None:
        """Prompt ``number`` has ended."""
        usage = finish.usage
        self.num_prompt_tokens += usage.num_prompt_tokens
        self.num_cached_tokens += usage.num_cached_prompt_tokens
        self.num_generated_tokens += max(0, usage.num_generated_tokens - self._num_hidden)
        self._finishes[number] = finish

    def usage(self) -> dict[str, Any]:
        """In OpenAI's names."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_generated_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
        if self.num_reasoning_tokens:
            details = {"reasoning_tokens": self.num_reasoning_tokens}
            usage["completion_tokens_details"] = details
        return usage

    def timing(self) -> dict[str, Any] | list[dict[str, Any]]:
        """An object; where there were several prompts, one for each."""
        timings = [_timing(finish) for _, finish in sorted(self._finishes.items())]
        return timings[0] if len(timings) == 1 else timings


def _timing(finish: Finish) -> dict[str, Any]:
    """Seconds, by the scheduler's clock; the parts add up to the whole."""
    timing = finish.timing
    queued, total = _seconds(timing.queued), _seconds(timing.total)
    model_wait = _seconds(timing.model_wait)
    first_token = _seconds(timing.first_token) if timing.HasField("first_token") else total
    return {
        "queue_s": queued,
        "queue_place_s": _rounded(queued - model_wait),
        "queue_model_s": model_wait,
        "prefill_s": _rounded(first_token - queued),
        "decode_s": _rounded(total - first_token),
        "total_s": total,
        "num_attempts": timing.num_attempts,
        "executor_id": timing.executor_id,
        "num_cached_tokens": finish.usage.num_cached_prompt_tokens,
        "is_inexact": timing.inexact,
    }


def _seconds(duration: duration_pb2.Duration) -> float:
    return _rounded(duration.seconds + duration.nanos / 1e9)


def _rounded(seconds: float) -> float:
    return max(0.0, round(seconds, 6))
