"""An engine without a model, for load and process tests.

Rule: its tokens are a pure function of (prompt, seed, sample, index), given by ``mock_tokens``, so
that whoever reads a stream can tell order, completeness, and whose tokens they are, and a resumed
lease goes on exactly. It ends a sample only at max_tokens, at one of its stop token ids, or, where
``eos_after_tokens`` is set, at the end-of-sequence token.

What else a lease may ask for is a formula too (mock_formulas.py): alternatives of a token, scores
of a prompt. Penalties and bias change nothing; a grammar is refused, because there is no text.
``num_cached`` says how much of a prompt the last one of its salt shared, and changes no timing.

At most ``max_models`` of its models are resident, the first ones at the start; loading another
takes ``load_ms``, in which nothing else happens.
"""

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from executor_svc.core.engine import (
    FinishReason,
    InvalidLeaseError,
    LeaseRequest,
    ModelAssets,
    ModelInfo,
    SamplingParams,
    SequenceEnd,
    StepOutput,
)
from executor_svc.core.lease_rules import check_lease
from executor_svc.core.stopping import StopRules
from executor_svc.mock_formulas import PRIME, STRIDE, mock_base, mock_scores
from executor_svc.mock_rows import MockRows, MockSequence
from headway.reasons import Reason

_MAX_SALTS = 1_024  # whose last prompt is remembered
# All mock engines draw the same tokens for the same request.
_EXACTNESS_CLASS = "mock"


@dataclass(frozen=True, slots=True, kw_only=True)
class MockConfig:
    """Settings of a MockEngine. ``step_ms`` 0 is as fast as possible, ``max_models`` 0 is all."""

    models: tuple[str, ...] = ("mock",)
    max_models: int = 0
    load_ms: int = 0
    num_slots: int = 256
    step_ms: float = 20.0
    tokens_per_step: int = 1
    prefill_ms_per_1k_tokens: float = 0.0
    vocab_size: int = 32_000
    max_context_tokens: int = 32_768
    eos_after_tokens: int | None = None


class MockEngine:
    """See the module's rule; the protocol is ``executor_svc.core.engine.Engine``."""

    def __init__(self, config: MockConfig) -> None:
        self._config = config
        self._eos = config.vocab_size - 1
        self._models = {
            name: ModelInfo(
                name=name,
                family="mock",
                vocab_size=config.vocab_size,
                max_context_tokens=config.max_context_tokens,
                eos_token_ids=(self._eos,),
                weights_digest=hashlib.sha256(name.encode()).hexdigest(),
                assets_digest=hashlib.sha256(b"").hexdigest(),
                dtype="float32",
                is_resident=number < self.max_models,
                load_ms=config.load_ms,
                exactness_class=_EXACTNESS_CLASS,
            )
            for number, name in enumerate(config.models)
        }
        self._leases: dict[int, list[MockSequence]] = {}  # by lease key: sequences that live
        self._early: dict[int, StepOutput] = {}  # by lease key: known before the next step
        # by (model, salt), the latest last; at most _MAX_SALTS
        self._last_prompts: OrderedDict[tuple[str, str], Sequence[int]] = OrderedDict()
        self._waiting: deque[MockSequence] = deque()
        self._rows = MockRows(config.vocab_size)
        self._timer = threading.Event()  # never set: waiting for it sleeps without the GIL
        self._step_ends_s = 0.0

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(self._models.values())

    @property
    def num_slots(self) -> int:
        return self._config.num_slots

    @property
    def max_models(self) -> int:
        num_models = len(self._config.models)
        return min(self._config.max_models or num_models, num_models)

    def load(self, model: str, evict: tuple[str, ...]) -> int:
        started_s = time.monotonic()
        for name in evict:
            self._set_resident(name, False)
        self._timer.wait(self._config.load_ms / 1000)
        self._set_resident(model, True)
        assert sum(info.is_resident for info in self.models) <= self.max_models
        return round((time.monotonic() - started_s) * 1000)

    def _set_resident(self, name: str, is_resident: bool) -> None:
        info = self._models[name]
        assert info.is_resident is not is_resident
        self._models[name] = replace(info, is_resident=is_resident)

    def assets(self, model: str) -> ModelAssets:
        """None: a mock model has no text."""
        assert model in self._models
        return ModelAssets(b"", b"", "", b"")

    def has_work(self) -> bool:
        return bool(self._leases or self._early)

    def close(self) -> None:
        for key in list(self._leases):
            self.abort(key)

    def add(self, request: LeaseRequest) -> None:
        model = self._models.get(request.model)
        if model is None:
            raise InvalidLeaseError(
                Reason.MODEL_NOT_FOUND, f"model {request.model!r} is not served here"
            )
        check_lease(request, model, can_match_text=False)
        if request.params.grammar is not None:
            raise InvalidLeaseError(
                Reason.INVALID_REQUEST, f"a grammar needs a tokenizer, {model.name} has none"
            )
        assert model.is_resident
        live = [
            self._sequence(request, sample)
            for sample in range(request.num_samples)
            if sample not in request.ended
        ]
        early = self._early[request.key] = StepOutput()
        early.ends += [s.end for s in live if s.index == s.end.num_tokens]
        early.num_cached[request.key] = self._num_cached(request)
        if request.scoring is not None:
            early.prompt_scores.append(mock_scores(request, request.scoring, model.vocab_size))
        live = [s for s in live if s.index < s.end.num_tokens]
        if live:
            self._leases[request.key] = live
            self._waiting.extend(live)

    def _num_cached(self, request: LeaseRequest) -> int:
        """Of the prompt's tokens but the last, which has to be computed for its logits."""
        salt, prompt = (request.model, request.cache_salt), request.prompt_token_ids
        before = self._last_prompts.pop(salt, ())
        self._last_prompts[salt] = prompt
        if len(self._last_prompts) > _MAX_SALTS:
            self._last_prompts.popitem(last=False)
        if before == prompt:
            return len(prompt) - 1
        num_shared = 0
        for ours, theirs in zip(prompt[:-1], before, strict=False):
            if ours != theirs:
                break
            num_shared += 1
        return num_shared

    def abort(self, key: int) -> None:
        self._early.pop(key, None)
        for sequence in self._leases.pop(key, ()):
            if sequence.place < 0:
                self._waiting.remove(sequence)
            else:
                self._rows.abort(sequence)

    def step(self) -> StepOutput:
        output = StepOutput()
        for early in self._early.values():
            output.ends += early.ends
            output.num_cached |= early.num_cached
            output.prompt_scores += early.prompt_scores
        self._early.clear()
        started_s = time.monotonic()
        output.num_decoded = len(self._rows)
        output.num_prefilled = num_prefill_tokens = self._join()
        for _ in range(self._config.tokens_per_step):
            if not self._rows:
                break
            for sequence in self._rows.run_round(output):
                live = self._leases[sequence.lease_key]
                live.remove(sequence)
                if not live:
                    del self._leases[sequence.lease_key]
        if output.num_top:  # a later round may have had none
            output.num_top += [0] * (len(output.key) - len(output.num_top))
        duration_ms = self._config.step_ms
        duration_ms += num_prefill_tokens * self._config.prefill_ms_per_1k_tokens / 1000
        if duration_ms:
            self._wait(started_s, duration_ms / 1000)
        return output

    def _sequence(self, request: LeaseRequest, sample: int) -> MockSequence:
        generated = request.generated[sample] if request.generated else ()
        base = mock_base(request.prompt_token_ids, request.params.seed, sample)
        end = self._find_end(request.key + sample, base, request.params, generated)
        return MockSequence(
            lease_key=request.key,
            key=request.key + sample,
            base=base,
            index=len(generated),
            end=end,
            num_prefill_tokens=len(request.prompt_token_ids) + len(generated),
            num_top=request.params.top_logprobs,
        )

    def _find_end(
        self, key: int, base: int, params: SamplingParams, generated: Sequence[int]
    ) -> SequenceEnd:
        """Where the sequence ends: its tokens are known, so this is too."""
        stop_token_ids = {*params.stop_token_ids}
        if not params.ignore_eos:
            stop_token_ids.add(self._eos)  # an earlier attempt may have drawn it
        rules = StopRules(params.max_tokens, params.min_tokens, frozenset(stop_token_ids))
        start = len(generated)
        if generated:
            end = rules.check(key, start - 1, generated[-1], b"")
            if end is not None:
                return end
        eos_index = params.max_tokens  # never
        if self._config.eos_after_tokens is not None and not params.ignore_eos:
            eos_index = max(self._config.eos_after_tokens - 1, params.min_tokens, start)
        if params.stop_token_ids:
            for index in range(start, min(eos_index, params.max_tokens)):
                token_id = (base ^ index * STRIDE) % PRIME % self._eos
                end = rules.check(key, index, token_id, b"")
                if end is not None:
                    return end
        if eos_index < params.max_tokens:
            return SequenceEnd(key, eos_index + 1, FinishReason.STOP, stop_token_id=self._eos)
        return SequenceEnd(key, params.max_tokens, FinishReason.LENGTH)

    def _join(self) -> int:
        """Seat who waits; gives the tokens to prefill."""
        num_prefill_tokens = 0
        while self._waiting and len(self._rows) < self._config.num_slots:
            sequence = self._waiting.popleft()
            self._rows.join(sequence)
            num_prefill_tokens += sequence.num_prefill_tokens
        return num_prefill_tokens

    def _wait(self, started_s: float, duration_s: float) -> None:
        """End the step ``duration_s`` after the last one, or after its start if that is past."""
        previous_s = self._step_ends_s
        is_in_row = started_s - previous_s < duration_s
        self._step_ends_s = (previous_s if is_in_row else started_s) + duration_s
        self._timer.wait(max(0.0, self._step_ends_s - time.monotonic()))
