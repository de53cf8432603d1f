"""Runs one step: chunks in, a token for each chunk that completes its sequence out."""

from collections.abc import Sequence as Rows

import numpy as np
import torch

from executor_svc.core.batcher import Chunk
from executor_svc.torch_engine.attention.base import AttentionBackend, StepLayout
from executor_svc.torch_engine.kv_cache import kv_slots
from executor_svc.torch_engine.models.decoder import Decoder
from executor_svc.torch_engine.sampler import RowParams, SamplingBatch, sample


class Runner:
    """The model, its cache and the buffers of a step."""

    def __init__(
        self,
        model: Decoder,
        backend: AttentionBackend,
        *,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._model, self._backend = model, backend
        self._block_size, self._device = block_size, device

    @torch.inference_mode()
    def run(self, chunks: Rows[Chunk], params: Rows[RowParams]) -> tuple[list[int], list[float]]:
        """Compute all chunks, draw for those that are last; ``params`` has a row for each of them.

        Returns token ids and logprobs in the order of the last chunks.
        """
        token_ids: list[int] = []
        positions, slots = [], []
        for chunk in chunks:
            end = chunk.start + chunk.num_tokens
            token_ids += chunk.sequence.token_ids[chunk.start : end]
            positions.append(np.arange(chunk.start, end))
            slots.append(kv_slots(chunk.sequence.block_table, chunk.start, end, self._block_size))
        self._backend.plan(
            StepLayout(
                query_lens=[chunk.num_tokens for chunk in chunks],
                context_lens=[chunk.start + chunk.num_tokens for chunk in chunks],
                block_tables=[chunk.sequence.block_table for chunk in chunks],
                kv_slot_mapping=self._to_device(np.concatenate(slots)),
            )
        )
        hidden = self._model.forward(
            self._to_device(np.array(token_ids)),
            self._to_device(np.concatenate(positions)),
            self._backend,
        )
        last = [i for i, chunk in enumerate(chunks) if chunk.is_last]
        if not last:
            return [], []
        ends = np.cumsum([chunk.num_tokens for chunk in chunks])
        logits = self._model.logits(hidden[self._to_device(ends[last] - 1)])
        indices = [chunks[i].sequence.num_output_tokens for i in last]
        drawn, logprobs = sample(logits, SamplingBatch(params, indices, self._device))
        return drawn.tolist(), logprobs.tolist()

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
