"""How ranks divide a model's tensors (Megatron-LM, Shoeybi et al. 2019).

The products of each block come in pairs. The first is divided by its outputs (whole heads, parts of
the inner size), so that each rank works on its own part up to the second, which is divided by its
inputs; the ranks' results are then summed. Embedding and head are divided by token ids. Experts are
divided each, not handed out: all ranks then work on all tokens.
"""

from dataclasses import dataclass, replace

from executor_svc.torch_engine.config import ModelSpec
from executor_svc.torch_engine.models.tensors import Shape

_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_BY_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model."""

    rank: int = 0
    size: int = 1

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The shape of the rank's decoder: its heads and inner sizes are the rank's alone.

        Raises ValueError if the model cannot be divided so.
        """
        experts = whole.experts
        if experts is not None:
            inner = self._divide("moe_intermediate_size", experts.intermediate_size)
            experts = replace(experts, intermediate_size=inner)
        self._divide("vocab_size", whole.vocab_size)
        return replace(
            whole,
            num_heads=self._divide("num_attention_heads", whole.num_heads),
            num_kv_heads=self._divide("num_key_value_heads", whole.num_kv_heads),
            intermediate_size=self._divide("intermediate_size", whole.intermediate_size),
            experts=experts,
        )

    def part(self, name: str, shape: Shape) -> tuple[slice, ...]:
        """What the rank takes of a tensor of this shape; empty is all of it."""
        dimension = _divided_dimension(name)
        if self.size == 1 or dimension is None:
            return ()
        length = shape[dimension] // self.size
        mine = slice(self.rank * length, (self.rank + 1) * length)
        return (mine,) if dimension == 0 else (slice(None), mine)

    def part_shape(self, name: str, shape: Shape) -> Shape:
        """The shape of that part."""
        part = self.part(name, shape) or (slice(None),)
        lengths = [len(range(n)[mine]) for n, mine in zip(shape, part, strict=False)]
        return (*lengths, *shape[len(part) :])

    def _divide(self, name: str, count: int) -> int:
        if count % self.size:
            raise ValueError(f"tensor_parallel_size: {self.size} does not divide {name}, {count}")
        return count // self.size


def _divided_dimension(name: str) -> int | None:
    """Weights are [out, in], biases [out]."""
    part = name.split(".")[-2]
    return 0 if part in _BY_OUTPUTS else 1 if part in _BY_INPUTS else None
