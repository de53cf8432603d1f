"""One OpenAI request as ``openai_serve`` runs it, and the samples that come of it."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import msgspec

from gateway_http.client import (
    Event,
    Finish,
    Generation,
    SampleEvent,
    SchedulerClient,
    Tokens,
)
from gateway_http.model_text import Text
from gateway_http.openai_choice import Choice, Delta, ReplySpec
from gateway_http.openai_output import ChatFormat, CompletionFormat, Echo, Format
from gateway_http.openai_place import MAX_CHOICES, Place
from gateway_http.openai_responses_output import ResponsesFormat
from gateway_http.openai_usage import Outcome
from gateway_http.refusals import in_clients_words, openai_names
from headway.bell import Bell
from headway.errors import HeadwayError
from headway.v1 import generation_pb2

RESUME_HEADER = "x-headway-resume"

_FORMATS: dict[str, Callable[[str, ReplySpec, Text], Format]] = {
    "chat": ChatFormat,
    "completion": CompletionFormat,
    "response": ResponsesFormat,
}


class Follow(msgspec.Struct, frozen=True):
    """Requests that were accepted before, and whose they are."""

    request_ids: Sequence[str]
    tenant: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A generation for each prompt, in their order, or some to follow.

    ``echoes`` has an entry for each prompt that is submitted, or is empty. ``is_kept``: there is a
    way back to it when its reader has gone. ``resume_from``: what was seen. ``grammar_field``
    is the parameter that asks for a grammar, if one does.
    """

    spec: ReplySpec
    text: Text
    is_streaming: bool
    requests: Sequence[generation_pb2.GenerationRequest] = ()
    follow: Follow | None = None
    is_kept: bool = False
    resume_from: Place | None = None
    echoes: Sequence[Echo] = ()
    grammar_field: str = ""

    @property
    def is_resumable(self) -> bool:
        """Whether its events have ids."""
        return self.is_streaming and self.spec.num_choices <= MAX_CHOICES

    def format(self, request_id: str) -> Format:
        """How its endpoint answers."""
        return _FORMATS[self.spec.kind](request_id, self.spec, self.text)

    def told(self, error: HeadwayError) -> HeadwayError:
        """What the scheduler says is wrong, as the client understands it."""
        return in_clients_words(error, openai_names(self.grammar_field))

    def start(self, client: SchedulerClient, changed: Bell) -> Iterator[Generation]:
        """Submit everything, or follow. Raises what the client refuses."""
        if self.follow is not None:
            for request_id in self.follow.request_ids:
                yield client.follow(
                    request_id,
                    self.follow.tenant,
                    num_samples=self.spec.num_samples,
                    wants_logprobs=self.spec.wants_logprobs,
                    changed=changed,
                )
        for request in self.requests:
            yield client.generate(request, is_kept=self.is_kept, changed=changed)

    def resume_state(self, request_ids: Sequence[str]) -> str:
        """What any gateway needs to continue this stream, besides the name of its request."""
        return msgspec.structs.replace(self.spec, others=list(request_ids[1:])).encode()


class Samples:
    """The choices of a job, in the order of their indexes, and what they add up to."""

    def __init__(self, job: Job, num_skipped: Sequence[int] = ()) -> None:
        self._job = job
        spec = self._spec = job.spec
        self.choices: list[Choice] = []
        for index in range(spec.num_choices):
            skipped = num_skipped[index] if num_skipped else 0
            prompt = index // spec.num_samples
            self.choices.append(Choice(spec, job.text, prompt, skipped))
        self.outcome = Outcome(spec.num_hidden * spec.num_samples)

    def index(self, number: int, sample: int = 0) -> int:
        """Of a prompt's sample among all choices."""
        return number * self._spec.num_samples + sample

    def push(self, index: int, event: SampleEvent) -> Delta:
        """What the choice gained."""
        choice = self.choices[index]
        if isinstance(event, Tokens):
            delta = choice.push(event)
            return Delta() if self._spec.num_hidden else delta
        delta = choice.finish(event.detail)
        return Delta(finish_reason="length") if self._spec.num_hidden else delta

    def finish(self, number: int, event: Finish) -> None:
        """A prompt has ended. Raises its failure."""
        if event.error is not None:
            raise self._job.told(event.error)
        self.outcome.add(number, event)

    def close(self) -> Outcome:
        """All have ended."""
        tokens = (choice.num_reasoning_tokens for choice in self.choices)
        self.outcome.num_reasoning_tokens = sum(tokens)
        return self.outcome


async def batches(
    generations: Sequence[Generation], changed: Bell
) -> AsyncIterator[list[tuple[int, Event]]]:
    """What all generations have to tell, with their numbers, as it comes, to their ends.

    The first batch is given at once, and may be empty: news may have come with the acceptance.
    """
    live = dict(enumerate(generations))
    while True:
        batch = [(number, event) for number, one in live.items() for event in one.poll()]
        for number, event in batch:
            if isinstance(event, Finish):
                del live[number]
        yield batch
        if not live:
            break
        await changed.wait()
