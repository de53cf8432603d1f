"""The engine that runs a model itself: step() = schedule, run, postprocess.

Rule: a lease's fault is the lease's alone. What it asks for is checked when it comes in; if a
step raises all the same, its chunks are run again one by one, and those that raise alone end
their leases with INTERNAL. That is safe because a chunk writes only to its own blocks and its
result does not depend on its company.

A fault of the engine is not the leases': if the device is lost, or if of several leases each one
raises alone, ``step`` raises. The process then ends, and other executors take the leases over;
else a broken device would go on taking leases and fail them faster than healthy ones can serve.
"""

import math

import torch

from executor_svc.core.batcher import Batcher, Chunk
from executor_svc.core.block_manager import BlockManager
from executor_svc.core.engine import (
    LeaseFailure,
    LeaseRequest,
    ModelAssets,
    ModelInfo,
    SequenceEnd,
    StepOutput,
)
from executor_svc.core.lease_rules import check_lease
from executor_svc.core.sequence import Sequence
from executor_svc.core.stopping import StopMatcher, StopRules
from executor_svc.torch_engine.attention.cpu import CpuAttention
from executor_svc.torch_engine.config import EngineConfig, find_device, load_spec
from executor_svc.torch_engine.kv_cache import KVCache, count_blocks
from executor_svc.torch_engine.loader import Checkpoint, assets_digest, find_model, read_assets
from executor_svc.torch_engine.models.decoder import Decoder, tensor_shapes
from executor_svc.torch_engine.runner import Runner
from executor_svc.torch_engine.sampler import RowParams
from executor_svc.torch_engine.token_bytes import TokenBytes
from headway.reasons import Reason

_ONE_THREAD_PARAMETERS = 100_000_000  # see EngineConfig


class TorchEngine:
    """Serves one model with torch. Building it loads the model, or raises ModelError."""

    def __init__(self, config: EngineConfig) -> None:
        device = find_device(config.device)
        folder = find_model(config.model)
        spec = load_spec(folder, dtype=config.dtype)
        shapes = tensor_shapes(spec)
        num_parameters = sum(map(math.prod, shapes.values()))
        if config.num_threads is not None or num_parameters < _ONE_THREAD_PARAMETERS:
            torch.set_num_threads(config.num_threads or 1)
        # A checkpoint whose head is tied may hold it a second time.
        ignored = ("lm_head.weight",) if spec.has_tied_head else ()
        checkpoint = Checkpoint(folder, shapes, ignored=ignored)
        model = Decoder(spec, lambda name: checkpoint.tensor(name).to(device, spec.dtype), device)

        num_blocks = count_blocks(config, spec, device)
        cache = KVCache(spec, num_blocks=num_blocks, block_size=config.block_size, device=device)
        attention = CpuAttention(cache, num_heads=spec.num_heads)
        self._runner = Runner(model, attention, block_size=config.block_size, device=device)
        self._batcher = Batcher(
            BlockManager(num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )

        self._assets = read_assets(folder)
        self._token_bytes: TokenBytes | None = None
        if self._assets.tokenizer_json:
            self._token_bytes = TokenBytes(self._assets.tokenizer_json)
        self._info = ModelInfo(
            name=config.served_name,
            family=spec.family,
            vocab_size=spec.vocab_size,
            max_context_tokens=min(
                spec.max_context_tokens,
                config.max_model_len or spec.max_context_tokens,
                num_blocks * config.block_size,  # a sequence that is alone always fits
            ),
            eos_token_ids=spec.eos_token_ids,
            weights_digest=checkpoint.digest(),
            assets_digest=assets_digest(self._assets),
            dtype=str(spec.dtype).removeprefix("torch."),
        )
        self._num_slots = config.max_num_seqs
        self._leases: dict[int, list[Sequence]] = {}  # by lease key: the sequences that live
        self._rows: dict[int, RowParams] = {}  # by sequence key, for the same sequences
        self._early_ends: dict[int, list[SequenceEnd]] = {}  # by lease key: known before a step

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return (self._info,)

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def assets(self, model: str) -> ModelAssets:
        """The files of the one model served, by its served name."""
        assert model == self._info.name
        return self._assets

    def has_work(self) -> bool:
        return bool(self._leases or self._early_ends)

    def close(self) -> None:
        """Forget all leases; memory goes with the engine itself."""
        for key in list(self._leases):
            self.abort(key)
        self._early_ends.clear()

    def add(self, request: LeaseRequest) -> None:
        """Take a lease; raises InvalidLeaseError and then holds nothing of it."""
        check_lease(request, self._info, can_match_text=self._can_match_text)
        assert request.key not in self._leases.keys() | self._early_ends.keys()
        live = []
        for sample in range(request.num_samples):
            if sample in request.ended:
                continue
            sequence, end = self._sequence(request, sample)
            if end is not None:
                self._early_ends.setdefault(request.key, []).append(end)
            else:
                live.append(sequence)
        if live:
            self._leases[request.key] = live
        for sequence in live:
            assert sequence.key not in self._rows
            self._rows[sequence.key] = RowParams.of(
                request.params, sequence.sample, sequence.stops.stop_token_ids
            )
            self._batcher.add(sequence)

    def abort(self, key: int) -> None:
        self._early_ends.pop(key, None)
        for sequence in self._leases.pop(key, ()):
            self._batcher.remove(sequence)
            del self._rows[sequence.key]

    def step(self) -> StepOutput:
        output = StepOutput()
        for ends in self._early_ends.values():
            output.ends += ends
        self._early_ends.clear()
        chunks = self._batcher.schedule()
        if chunks:
            self._run(chunks, output)
        return output

    @property
    def _can_match_text(self) -> bool:
        return self._token_bytes is not None and self._token_bytes.is_supported

    def _sequence(self, request: LeaseRequest, sample: int) -> tuple[Sequence, SequenceEnd | None]:
        """Sample number ``sample`` of a lease, replayed up to where an earlier attempt came.

        The end is given if what is there already ends the sequence.
        """
        params = request.params
        stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids |= frozenset(self._info.eos_token_ids)
        matcher = StopMatcher(params.stop_strings) if params.stop_strings else None
        sequence = Sequence(
            key=request.key + sample,
            lease_key=request.key,
            sample=sample,
            params=params,
            stops=StopRules(params.max_tokens, params.min_tokens, stop_token_ids, matcher),
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
        )
        end = None
        for token_id in request.generated[sample] if request.generated else ():
            end = sequence.append(token_id, self._piece(sequence, token_id))
        return sequence, end

    def _piece(self, sequence: Sequence, token_id: int) -> bytes:
        """The token's bytes, where the sequence looks at them."""
        if sequence.stops.matcher is None or self._token_bytes is None:
            return b""
        return self._token_bytes[token_id]

    def _run(self, chunks: list[Chunk], output: StepOutput) -> None:
        """Run chunks together, or one by one if that raises, and take in what comes out."""
        last = [chunk.sequence for chunk in chunks if chunk.is_last]
        try:
            rows = [self._rows[sequence.key] for sequence in last]
            token_ids, logprobs = self._runner.run(chunks, rows)
        except torch.AcceleratorError:
            raise  # whatever comes after it fails too
        except Exception as fault:
            if len(chunks) == 1:
                self._fail(chunks[0].sequence.lease_key, repr(fault), output)
                return
            num_failures = len(output.failures)
            lease_keys = {chunk.sequence.lease_key for chunk in chunks}
            for chunk in chunks:
                if chunk.sequence.lease_key in self._leases:
                    self._run([chunk], output)
            if len(output.failures) - num_failures == len(lease_keys) > 1:
                raise
            return
        for sequence, token_id, logprob in zip(last, token_ids, logprobs, strict=True):
            if sequence.lease_key not in self._leases:
                continue  # another sample of the lease has just failed
            if not math.isfinite(logprob):
                self._fail(sequence.lease_key, "the model's logits are not finite", output)
                continue
            try:
                self._accept(sequence, token_id, logprob, output)
            except Exception as fault:
                self._fail(sequence.lease_key, repr(fault), output)

    def _accept(
        self, sequence: Sequence, token_id: int, logprob: float, output: StepOutput
    ) -> None:
        """Add a token to its sequence and to the output; finish the sequence if it was the last."""
        index = sequence.num_output_tokens
        end = sequence.append(token_id, self._piece(sequence, token_id))
        output.key.append(sequence.key)
        output.index.append(index)
        output.token_id.append(token_id)
        output.logprob.append(logprob)
        if end is None:
            return
        output.ends.append(end)
        self._batcher.remove(sequence)
        del self._rows[sequence.key]
        live = self._leases[sequence.lease_key]
        live.remove(sequence)
        if not live:
            del self._leases[sequence.lease_key]

    def _fail(self, lease_key: int, detail: str, output: StepOutput) -> None:
        self.abort(lease_key)
        output.failures.append(LeaseFailure(lease_key, Reason.INTERNAL, detail))
