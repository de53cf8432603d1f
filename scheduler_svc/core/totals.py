"""What was served of each model since the start, and for how long each was nowhere.

Rule: sums only, so that a reader takes the difference of two looks. A model is nowhere while no
executor that serves has it on its device; what of a request's wait fell into such times is the
difference of ``nowhere_ms`` between its acceptance and its first grant.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class ModelTotals:
    """Sums of one model."""

    # granted for the first time, and their prompts and max_tokens
    num_requests: int = 0
    num_tokens: int = 0
    # finished times of being nowhere, and since when it is nowhere again
    nowhere_ms: int = 0
    nowhere_since_ms: int | None = None


class Totals:
    """By model; those that are not known any more are forgotten."""

    def __init__(self) -> None:
        self.models: dict[str, ModelTotals] = {}

    def granted(self, model: str, num_tokens: int) -> None:
        """A request of a model got its first grant."""
        totals = self.models[model]
        totals.num_requests += 1
        totals.num_tokens += num_tokens

    def moved(self, model: str, has_home: bool, now_ms: int) -> None:
        """A model may have got its first home, or lost its last one."""
        totals = self.models.get(model)
        if totals is None:
            totals = self.models[model] = ModelTotals()
        since_ms = totals.nowhere_since_ms
        if not has_home:
            totals.nowhere_since_ms = now_ms if since_ms is None else since_ms
        elif since_ms is not None:
            totals.nowhere_ms += now_ms - since_ms
            totals.nowhere_since_ms = None

    def nowhere_ms(self, model: str, now_ms: int) -> int:
        """For how long it has been nowhere until now, all in all."""
        totals = self.models[model]
        since_ms = totals.nowhere_since_ms
        return totals.nowhere_ms + (0 if since_ms is None else now_ms - since_ms)

    def forget(self, model: str) -> None:
        """It is not known any more."""
        self.models.pop(model, None)
