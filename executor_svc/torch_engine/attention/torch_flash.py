"""Attention by the FlashAttention that torch brings (torch 2.12 and newer): ``varlen_attn``.

It reads the paged cache through block tables for prefill and decode alike.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from executor_svc.torch_engine.attention.flash_backend import FlashBackend


class TorchFlashAttention(FlashBackend):
    """See the module's text."""

    name = "torch"
    numerics = f"torch {torch.__version__} varlen_attn"

    def _attended(self, q: Tensor, keys: Tensor, values: Tensor, seen: tuple[int, int]) -> Tensor:
        plan = self._plan
        attended = varlen_attn(
            q,
            keys,
            values,
            plan.query_starts,
            plan.key_starts,
            plan.max_query_len,
            plan.max_context,
            window_size=seen,
            enable_gqa=True,
            seqused_k=plan.contexts,
            block_table=plan.tables,
        )
        assert isinstance(attended, Tensor)  # a tuple only if more is asked for
        return attended
