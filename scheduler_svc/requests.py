"""The requests in the shell's care: pending (not yet answered by the core) and live.

A request is live from its acceptance until its end is committed. The core decides about it; what
is kept here is what the core has no use for: the body, the tokens, and who is waiting; and how the
runtime speaks to whoever submitted a request or runs it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from headway.errors import HeadwayError
from headway.v1 import generation_pb2 as generation
from scheduler_svc.core import messages
from scheduler_svc.outputs import Output


@dataclass(eq=False, slots=True, weakref_slot=True)
class LiveRequest:
    """A request and everything around it. ``is_detached``: it outlives its readers."""

    request_id: str
    tenant: str
    output: Output
    body: generation.GenerationRequest
    is_detached: bool
    waiters: list["asyncio.Future[generation.GenerationResult]"] = field(default_factory=list)
    grace: asyncio.TimerHandle | None = None
    # when a future was last asked for
    asked_ms: int = 0

    @property
    def has_finished(self) -> bool:
        """Its end is committed."""
        return self.output.result is not None

    def stop_grace(self) -> None:
        """Somebody follows it again, or it is over."""
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None


class SubmitSink(Protocol):
    """Whoever submitted; called once, by the runtime, and must not raise."""

    def accepted(self, live: LiveRequest) -> None:
        """The request, or the earlier one with the same key, is in our care or has ended."""

    def rejected(self, error: HeadwayError) -> None:
        """The request was never queued."""


class Submission(NamedTuple):
    """A valid request on its way to the core. ``quota``: the limits of whoever asks, if any."""

    request: messages.Request
    body: generation.GenerationRequest
    vocab_size: int
    is_detached: bool
    sink: SubmitSink
    quota: generation.Quota | None

    def to_live(self) -> LiveRequest:
        """As it is once the core admitted it."""
        output = Output(
            self.request.request_id,
            num_samples=self.request.num_samples,
            max_tokens=self.request.max_tokens,
            vocab_size=self.vocab_size,
            has_logprobs=self.body.sampling.logprobs,
            num_top=self.body.sampling.top_logprobs,
            num_prompt_tokens=self.request.num_prompt_tokens,
            scoring=self.body.prompt_scoring if self.body.HasField("prompt_scoring") else None,
        )
        return LiveRequest(
            self.request.request_id, self.request.tenant, output, self.body, self.is_detached
        )


@dataclass(slots=True)
class Requests:
    """All in the shell's care, by id."""

    pending: dict[str, Submission] = field(default_factory=dict)
    live: dict[str, LiveRequest] = field(default_factory=dict)


class ExecutorLink(Protocol):
    """One executor session, as effects see it. Calls only note what to send."""

    def welcome(self) -> None:
        """The session stands."""

    def grant(self, live: LiveRequest, attempt: int) -> None:
        """Start a lease."""

    def adopt(self, live: LiveRequest, effect: messages.LeaseAdopted) -> None:
        """Go on with a lease from an earlier session."""

    def revoke(self, effect: messages.LeaseRevoked) -> None:
        """Stop a lease."""

    def acknowledge(self, effect: messages.LeaseAcknowledged) -> None:
        """Forget a lease."""

    def load(self, effect: messages.ModelLoadOrdered) -> None:
        """Put a model on the device."""

    def close(self, error: HeadwayError | None) -> None:
        """Cut the session."""


class FutureSink:
    """For calls that await the answer. ``abandon`` gets a request whose caller is gone."""

    def __init__(self, abandon: Callable[[LiveRequest], None]) -> None:
        self._answer: asyncio.Future[LiveRequest] = asyncio.get_running_loop().create_future()
        self._abandon = abandon

    async def answer(self) -> LiveRequest:
        """The accepted request. Raises HeadwayError."""
        try:
            return await self._answer
        except asyncio.CancelledError:
            # the call can be cancelled after it was answered and before it runs again
            if not self._answer.cancelled() and self._answer.exception() is None:
                self._abandon(self._answer.result())
            raise

    def accepted(self, live: LiveRequest) -> None:
        """See SubmitSink."""
        if self._answer.done():
            self._abandon(live)
        else:
            self._answer.set_result(live)

    def rejected(self, error: HeadwayError) -> None:
        """See SubmitSink."""
        if not self._answer.done():
            self._answer.set_exception(error)
