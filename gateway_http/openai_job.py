"""One OpenAI request as ``openai_serve`` runs it."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from gateway_http.client import Generation, SchedulerClient
from gateway_http.model_text import Text
from gateway_http.openai_choice import Choice, ReplySpec, tail_of
from gateway_http.openai_output import Echo, Format
from headway.v1 import generation_pb2

RESUME_HEADER = "x-headway-resume"

FormatFactory = Callable[[str, ReplySpec, Text], Format]


@dataclass(frozen=True, slots=True)
class Follow:
    """A request that was accepted before, and whose it is."""

    request_id: str
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A generation for each prompt, in their order, or one to follow.

    ``echoes`` has an entry for each prompt, or is empty. ``num_hidden``: so many tokens of each
    sample are generated only because at least one must be. ``resume_from`` is a request and how
    many of its events were seen. ``caller_id`` is the caller's own name for this call.
    """

    spec: ReplySpec
    text: Text
    make_format: FormatFactory
    is_streaming: bool
    requests: Sequence[generation_pb2.GenerationRequest] = ()
    follow: Follow | None = None
    is_kept: bool = False
    is_resumable: bool = False
    resume_from: tuple[str, int] | None = None
    echoes: Sequence[Echo] = ()
    num_hidden: int = 0
    caller_id: str = ""

    @property
    def num_skipped(self) -> int:
        """Tokens that were delivered on an earlier connection."""
        return self.resume_from[1] if self.resume_from is not None else 0

    def choices(self) -> list[Choice]:
        """One for each sample of each prompt."""
        prompts = [tail_of(request.prompt_token_ids) for request in self.requests]
        choices = []
        for number, tail in enumerate(prompts or [self.spec.prompt_tail]):
            spec = msgspec.structs.replace(self.spec, prompt_tail=tail)
            num_chars = len(self.echoes[number].text) if self.echoes else 0
            for _ in range(self.spec.num_samples):
                choices.append(Choice(spec, self.text, self.num_skipped, num_chars))
        return choices

    def start(self, client: SchedulerClient, changed: asyncio.Event) -> Iterator[Generation]:
        """Submit everything, or follow. Raises what the client refuses."""
        if self.follow is not None:
            yield client.follow(
                self.follow.request_id,
                self.follow.tenant,
                num_samples=self.spec.num_samples,
                wants_logprobs=self.spec.wants_logprobs,
                changed=changed,
            )
        for request in self.requests:
            yield client.generate(request, is_kept=self.is_kept, changed=changed)

    def resume_state(self) -> str:
        """What any gateway needs to continue this stream, besides its name."""
        spec = self.spec
        if self.requests:
            tail = tail_of(self.requests[0].prompt_token_ids)
            spec = msgspec.structs.replace(spec, prompt_tail=tail)
        return spec.encode()
