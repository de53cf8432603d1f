"""The engine that runs models itself: step() = schedule, run, postprocess, for each of them.

Rule: a lease's fault is the lease's alone. What it asks for is checked when it comes in; if a
step raises all the same, its chunks are run again one by one, and those that raise alone end
their leases with INTERNAL. That is safe because a chunk writes only to its own blocks and its
result does not depend on its company.

A fault of the engine is not the leases': if the device is lost, or if of several leases each one
raises alone, ``step`` raises. The process then ends, and other executors take the leases over;
else a broken device would go on taking leases and fail them faster than healthy ones can serve.
"""

import math
import time

import torch

from executor_svc.core.batcher import Batcher, Chunk
from executor_svc.core.block_manager import BlockManager
from executor_svc.core.engine import (
    InvalidLeaseError,
    LeaseFailure,
    LeaseRequest,
    ModelAssets,
    ModelInfo,
    ModelLoadError,
    SequenceEnd,
    StepOutput,
)
from executor_svc.core.lease_rules import check_lease
from executor_svc.core.sequence import Sequence
from executor_svc.core.stopping import StopMatcher, StopRules
from executor_svc.torch_engine.attention.cpu import CpuAttention
from executor_svc.torch_engine.config import EngineConfig, find_device
from executor_svc.torch_engine.files import ModelError
from executor_svc.torch_engine.kv_cache import KVCache
from executor_svc.torch_engine.models.decoder import Decoder
from executor_svc.torch_engine.residency import KnownModel, Residency
from executor_svc.torch_engine.runner import Runner
from executor_svc.torch_engine.sampler import RowParams
from headway.reasons import Reason

_ONE_THREAD_PARAMETERS = 100_000_000  # see EngineConfig


class TorchEngine:
    """Serves models with torch. Building it loads the first max_models, or raises ModelError."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._device = find_device(config.device)
        self._residency = Residency(config, self._device)
        if (
            config.num_threads is not None
            or self._residency.max_parameters < _ONE_THREAD_PARAMETERS
        ):
            torch.set_num_threads(config.num_threads or 1)
        self._resident: dict[str, ResidentModel] = {}  # at most max_models
        for name in list(self._residency.models)[: self.max_models]:
            try:
                self.load(name, ())
            except ModelLoadError as error:
                raise ModelError(str(error)) from error

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(
            self._residency.info(name, is_resident=name in self._resident)
            for name in self._residency.models
        )

    @property
    def num_slots(self) -> int:
        return self._config.max_num_seqs

    @property
    def max_models(self) -> int:
        return self._residency.max_models

    def load(self, model: str, evict: tuple[str, ...]) -> int:
        started_s = time.monotonic()
        for name in evict:
            assert not self._resident[name].has_work()
            del self._resident[name]
            self._residency.leave(name)
        assert model not in self._resident
        assert len(self._resident) < self.max_models
        try:
            decoder = self._residency.bring(model, set(self._resident))
            known = self._residency.models[model]
            self._resident[model] = ResidentModel(known, decoder, self._config, self._device)
        except ModelLoadError:
            raise
        except Exception as fault:  # files that changed, memory that others took
            raise ModelLoadError(f"{model}: {fault!r}") from fault
        load_ms = round((time.monotonic() - started_s) * 1000)
        self._residency.loaded(model, load_ms)
        return load_ms

    def assets(self, model: str) -> ModelAssets:
        """The files of a model, by its served name."""
        return self._residency.models[model].assets

    def has_work(self) -> bool:
        return any(model.has_work() for model in self._resident.values())

    def close(self) -> None:
        """Forget all leases; memory goes with the engine itself."""
        for model in self._resident.values():
            model.close()

    def add(self, request: LeaseRequest) -> None:
        """Take a lease; raises InvalidLeaseError and then holds nothing of it."""
        if request.model not in self._residency.models:
            raise InvalidLeaseError(
                Reason.MODEL_NOT_FOUND, f"model {request.model!r} is not served here"
            )
        self._resident[request.model].add(request)

    def abort(self, key: int) -> None:
        for model in self._resident.values():
            model.abort(key)

    def step(self) -> StepOutput:
        """One batch of each model that has work, one model after the other."""
        output = StepOutput()
        for model in self._resident.values():
            model.step(output)
        return output


class ResidentModel:
    """A model on the device: its KV cache, and the leases that run on it."""

    def __init__(
        self, known: KnownModel, decoder: Decoder, config: EngineConfig, device: torch.device
    ) -> None:
        num_blocks, block_size = known.num_blocks, config.block_size
        cache = KVCache(known.spec, num_blocks=num_blocks, block_size=block_size, device=device)
        attention = CpuAttention(cache, num_heads=known.spec.num_heads)
        self._runner = Runner(decoder, attention, block_size=block_size, device=device)
        self._batcher = Batcher(
            BlockManager(num_blocks, block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._info = known.info
        self._token_bytes = known.token_bytes
        self._leases: dict[int, list[Sequence]] = {}  # by lease key: the sequences that live
        self._rows: dict[int, RowParams] = {}  # by sequence key, for the same sequences
        self._early_ends: dict[int, list[SequenceEnd]] = {}  # by lease key: known before a step

    def has_work(self) -> bool:
        return bool(self._leases or self._early_ends)

    def close(self) -> None:
        """Forget all leases."""
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

    def step(self, output: StepOutput) -> None:
        """Run one step and append what it makes."""
        for ends in self._early_ends.values():
            output.ends += ends
        self._early_ends.clear()
        chunks = self._batcher.schedule()
        if chunks:
            self._run(chunks, output)

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
