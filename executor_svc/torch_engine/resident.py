"""A model on the device, its KV cache, and the leases that run on it.

Rule: a lease's fault is the lease's alone. What it asks for is checked when it comes in; if a
step raises all the same, its chunks are run again one by one, and those that raise alone end
their leases with INTERNAL. That is safe because a chunk writes only to its own blocks and its
result does not depend on its company.

Where the device works on its own, a step is planned and launched while the one before runs, and the
results of that one are taken in only then (``overlap_scheduling``). Its tokens are pending until
then: a sequence has a place for each, and the next step finds it on the device. So a stop is found
one step late, and what that step did for the sequence is dropped. If a row's next token depends on
its text (penalties, a grammar), the results are waited for first. Everything runs in the order of
launches, so a block that is given back may be handed out at once, whatever still reads it.

A fault of the engine is not the leases': if the device is lost, or if of several leases each one
raises alone, ``step`` raises. The process then ends, and other executors take the leases over;
else a broken device would go on taking leases and fail them faster than healthy ones can serve.
"""

import math

import torch

from executor_svc.core.batcher import Batcher, Chunk
from executor_svc.core.block_manager import BlockManager
from executor_svc.core.engine import (
    InvalidLeaseError,
    LeaseFailure,
    LeaseRequest,
    SequenceEnd,
    StepOutput,
)
from executor_svc.core.sequence import Sequence
from executor_svc.torch_engine.arrivals import Arrival, Arrivals, Waiting
from executor_svc.torch_engine.attention.choice import make_attention
from executor_svc.torch_engine.config import EngineConfig
from executor_svc.torch_engine.flight import Flight
from executor_svc.torch_engine.known_model import KnownModel
from executor_svc.torch_engine.models.decoder import Model
from executor_svc.torch_engine.runner import Runner, Top
from executor_svc.torch_engine.sampler import Row
from executor_svc.torch_engine.scoring import PromptScorer
from executor_svc.torch_engine.tensor_parallel import RankDiedError
from headway.reasons import Reason

_COMPILE_WAIT_S = 0.01  # of a step that has nothing else to do
_NOT_FINITE = "the model's logits are not finite"


class ResidentModel:
    """Serves the leases of one model, which it holds with their sequences and blocks."""

    def __init__(
        self, known: KnownModel, model: Model, config: EngineConfig, device: torch.device
    ) -> None:
        num_blocks, block_size = known.num_blocks, config.block_size
        attention = model.attach(
            make_attention(known.spec, config, num_blocks=num_blocks, device=device)
        )
        self.attention_numerics = f"{attention.numerics} windows={known.spec.windows}"
        has_graphs = (
            attention.supports_graphs
            and device.type == "cuda"
            and not config.enforce_eager
            and known.spec.experts is None  # in a loop over them the host reads who has rows
        )
        self._runner = Runner(
            model,
            attention,
            block_size=block_size,
            device=device,
            graphs_up_to=config.max_num_seqs if has_graphs else 0,
        )
        self._batcher = Batcher(
            BlockManager(num_blocks, block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._arrivals = Arrivals(known, max_logits_rows=config.max_logits_rows)
        self._overlaps = config.overlap_scheduling
        if self._overlaps is None:
            # A CPU has computed a step by the time it is launched.
            self._overlaps = device.type == "cuda"
        self._flight: Flight | None = None
        self._leases: dict[int, list[Sequence]] = {}  # by lease key: the sequences that live
        self._rows: dict[Sequence, Row] = {}  # of the same sequences
        self._early_ends: dict[int, list[SequenceEnd]] = {}  # by lease key: known before a step
        self._fresh: set[int] = set()  # keys of leases that did not begin yet
        self._waiting = Waiting()  # for their grammars

    @property
    def num_preemptions(self) -> int:
        return self._batcher.num_preemptions

    def has_work(self) -> bool:
        return bool(self._leases or self._early_ends or self._waiting)

    def close(self) -> None:
        """Forget all leases."""
        for key in list(self._leases):
            self.abort(key)
        self._waiting.clear()
        self._early_ends.clear()
        self._flight = None

    def add(self, request: LeaseRequest) -> None:
        """Take a lease; raises InvalidLeaseError and then holds nothing of it."""
        assert request.key not in (self._leases | self._early_ends)
        assert request.key not in self._waiting
        keys = range(request.key, request.key + request.num_samples)
        assert not any(sequence.key in keys for sequence in self._rows)
        arrival = self._arrivals.take(request)
        if arrival.is_ready:
            self._enlist(arrival)
        else:
            self._waiting.add(arrival)
        if arrival.ends:
            self._early_ends[request.key] = arrival.ends

    def _enlist(self, arrival: Arrival) -> None:
        """Let the sequences of a lease join. Raises InvalidLeaseError and then holds nothing."""
        rows = self._arrivals.rows(arrival)
        if arrival.live:
            self._leases[arrival.request.key] = arrival.live
            self._fresh.add(arrival.request.key)
        for sequence, row in zip(arrival.live, rows, strict=True):
            self._rows[sequence] = row
            self._batcher.add(sequence)

    def abort(self, key: int, *, is_sound: bool = True) -> None:
        """Forget a lease, if it is here; the cache keeps what it computed, if that is sound."""
        self._early_ends.pop(key, None)
        self._waiting.drop(key)
        self._fresh.discard(key)
        for sequence in self._leases.pop(key, ()):
            self._batcher.remove(sequence, is_sound=is_sound)
            del self._rows[sequence]

    def step(self, output: StepOutput) -> None:
        """Launch a step, and append what the one before made; or this one, where none overlap."""
        for ends in self._early_ends.values():
            output.ends += ends
        self._early_ends.clear()
        if self._waiting:
            self._take_compiled(output)
        chunks = self._batcher.schedule()
        num_decoded = sum(chunk.num_tokens == 1 for chunk in chunks)
        output.num_decoded += num_decoded
        output.num_prefilled += sum(chunk.num_tokens for chunk in chunks) - num_decoded
        if self._fresh:
            self._tell_cached(chunks, output)
        flight = self._launch(chunks, output) if chunks else None
        self._land(output)
        self._flight = flight
        if flight is None:
            return
        if not self._overlaps or flight.needs_landing:
            self._land(output)
            return
        flight.leave_places(self._rows)

    def _take_compiled(self, output: StepOutput) -> None:
        """Let leases join whose grammar is compiled, or say why it cannot be."""
        for arrival in self._waiting.take_ready(timeout_s=0 if self._leases else _COMPILE_WAIT_S):
            key = arrival.request.key
            try:
                self._enlist(arrival)
            except InvalidLeaseError as refusal:
                failure = LeaseFailure(key, refusal.reason, str(refusal), message=str(refusal))
                output.failures.append(failure)
            except Exception as fault:  # no process could be started, or the like
                output.failures.append(LeaseFailure(key, Reason.INTERNAL, repr(fault)))

    def _tell_cached(self, chunks: list[Chunk], output: StepOutput) -> None:
        """Say of each lease that begins with this step what part of its prompt was cached."""
        for sequence in (chunk.sequence for chunk in chunks):
            if sequence.lease_key in self._fresh:
                self._fresh.remove(sequence.lease_key)
                num_cached = min(sequence.num_cached_tokens, sequence.num_prompt_tokens)
                output.num_cached[sequence.lease_key] = num_cached

    def _launch(self, chunks: list[Chunk], output: StepOutput) -> Flight | None:
        """Start chunks together; if that raises, run them one by one, and none is left to land."""
        rows = [self._rows[chunk.sequence] for chunk in chunks]
        previous = self._flight.launched if self._flight is not None else None
        try:
            return Flight(chunks, rows, self._runner.launch(chunks, rows, previous))
        except (torch.AcceleratorError, RankDiedError):
            raise  # whatever comes after it fails too
        except Exception as fault:
            self._land(output)  # which gives each of them its last token, and may end some
            chunks = [chunk for chunk in chunks if chunk.sequence in self._rows]
            num_failures = len(output.failures)
            lease_keys = {chunk.sequence.lease_key for chunk in chunks}
            if len(rows) == 1:
                for lease_key in lease_keys:
                    self._fail(lease_key, repr(fault), output)
                return None
            for chunk in chunks:
                if chunk.sequence in self._rows:  # no other sample of its lease has failed
                    self._flight = self._launch([chunk], output)
                    self._land(output)
            if len(output.failures) - num_failures == len(lease_keys) > 1:
                raise
            return None

    def _land(self, output: StepOutput) -> None:
        """Take in what the step in flight has made, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        result = flight.result()
        self._batcher.complete([chunk for chunk in flight.chunks if chunk.sequence in self._rows])
        for chunk, row in zip(flight.chunks, flight.rows, strict=True):
            if row.scorer is not None and chunk.sequence in self._rows:
                self._take_scores(chunk.sequence, row, row.scorer, output)
        for sequence, i in flight.launched.row_of.items():
            if sequence not in self._rows:
                continue  # ended, aborted, or another sample of the lease has just failed
            if problem := result.problems.get(i):
                self._fail(sequence.lease_key, problem, output, reason=Reason.INVALID_REQUEST)
                continue
            logprob = result.logprobs[i]
            if not math.isfinite(logprob):
                self._fail(sequence.lease_key, _NOT_FINITE, output)
                continue
            try:
                top = result.tops[i] if result.tops else None
                self._accept(sequence, result.token_ids[i], logprob, top, output)
            except Exception as fault:
                self._fail(sequence.lease_key, repr(fault), output)
        if output.num_top:
            _fill_num_top(output)

    def _take_scores(
        self, sequence: Sequence, row: Row, scorer: PromptScorer, output: StepOutput
    ) -> None:
        """Report the scores of a lease's prompt, if they are complete."""
        if not scorer.is_complete:
            # What is not scored yet has to be computed, whatever the cache has.
            sequence.max_cached_tokens = scorer.next_row
            return
        row.scorer = sequence.max_cached_tokens = None
        if scorer.is_finite:
            output.prompt_scores.append(scorer.result(sequence.lease_key))
        else:
            self._fail(sequence.lease_key, _NOT_FINITE, output)

    def _accept(
        self,
        sequence: Sequence,
        token_id: int,
        logprob: float,
        top: Top | None,
        output: StepOutput,
    ) -> None:
        """Add a token to its sequence and to the output; finish the sequence if it was the last."""
        index = sequence.num_output_tokens
        end = sequence.append(token_id, self._arrivals.piece(sequence, token_id))
        if top is not None:
            _fill_num_top(output)
            output.num_top.append(len(top.token_ids))
            output.top_token_id += top.token_ids
            output.top_logprob += top.logprobs
        output.key.append(sequence.key)
        output.index.append(index)
        output.token_id.append(token_id)
        output.logprob.append(logprob)
        if end is None:
            return
        output.ends.append(end)
        self._batcher.remove(sequence)
        del self._rows[sequence]
        live = self._leases[sequence.lease_key]
        live.remove(sequence)
        if not live:
            del self._leases[sequence.lease_key]

    def _fail(
        self,
        lease_key: int,
        detail: str,
        output: StepOutput,
        *,
        reason: Reason = Reason.INTERNAL,
    ) -> None:
        """End a lease. If it is to blame itself, its client is told, and its blocks are sound."""
        is_internal = reason is Reason.INTERNAL
        self.abort(lease_key, is_sound=not is_internal)
        message = "" if is_internal else detail
        output.failures.append(LeaseFailure(lease_key, reason, detail, message))


def _fill_num_top(output: StepOutput) -> None:
    """Entries so far that have no alternatives get their 0."""
    output.num_top += [0] * (len(output.key) - len(output.num_top))
