"""Steps as attention backends get them."""

import numpy as np
import torch

from executor_svc.torch_engine.attention.base import StepLayout
from executor_svc.torch_engine.kv_cache import kv_slots


def layout_of(chunks: list[tuple[int, int, list[int]]], block_size: int) -> StepLayout:
    """Some (new tokens, context, block table)."""
    slots = [kv_slots(table, context - new, context, block_size) for new, context, table in chunks]
    return StepLayout(
        query_lens=[new for new, *_ in chunks],
        context_lens=[context for _, context, _ in chunks],
        block_tables=[table for *_, table in chunks],
        kv_slot_mapping=torch.from_numpy(np.concatenate(slots)),
    )
