"""From the engine's steps into the samples of leases.

Rule: what the engine says of sequences and leases that are not open any more is skipped, for they
were aborted while the step ran; anything else out of order is a fault of the engine, and asserts.
"""

from collections.abc import Mapping

from executor_svc.core.engine import StepOutput
from executor_svc.core.leases import Lease, Sample
from executor_svc.core.outbox import Outbox


def take_output(
    output: StepOutput,
    running: Mapping[int, Lease],
    open_samples: dict[int, Sample],
    outbox: Outbox,
) -> list[Lease]:
    """Keep what one or more steps made; gives the leases whose last sample ended.

    ``running`` and ``open_samples`` are by key; samples that ended are taken out.
    """
    _take_prefills(output, running, outbox)
    if output.num_top:
        _take_alternatives(output, open_samples)
    dirty = outbox.dirty
    for key, index, token_id, logprob in zip(
        output.key, output.index, output.token_id, output.logprob, strict=True
    ):
        sample = open_samples.get(key)
        if sample is None:
            continue
        assert index == len(sample.token_ids), "the engine skipped or repeated a token"
        sample.token_ids.append(token_id)
        if sample.logprobs is not None:
            sample.logprobs.append(logprob)
        dirty[key] = sample
    return _take_ends(output, open_samples, outbox)


def _take_prefills(output: StepOutput, running: Mapping[int, Lease], outbox: Outbox) -> None:
    """What the engine says of prompts."""
    for key, num_cached in output.num_cached.items():
        if (lease := running.get(key)) is not None:
            lease.num_cached_prompt_tokens = num_cached
    for scores in output.prompt_scores:
        if (lease := running.get(scores.key)) is not None:
            assert lease.scores is None, "the engine scored a prompt twice"
            lease.scores = scores
            outbox.scored[lease.key] = lease


def _take_alternatives(output: StepOutput, open_samples: Mapping[int, Sample]) -> None:
    """Of tokens that are yet to be taken: their samples are still open."""
    stop = 0
    for key, num_top in zip(output.key, output.num_top, strict=True):
        start, stop = stop, stop + num_top
        sample = open_samples.get(key)
        if sample is None:
            continue
        assert num_top == sample.num_top, "the engine gave more or fewer alternatives"
        sample.top_token_ids += output.top_token_id[start:stop]
        sample.top_logprobs += output.top_logprob[start:stop]


def _take_ends(output: StepOutput, open_samples: dict[int, Sample], outbox: Outbox) -> list[Lease]:
    complete = []
    for end in output.ends:
        sample = open_samples.pop(end.key, None)
        if sample is None:
            continue
        assert end.num_tokens == len(sample.token_ids), "an end came before its last token"
        sample.end = end
        outbox.dirty[end.key] = sample
        sample.lease.num_open -= 1
        if not sample.lease.num_open:
            complete.append(sample.lease)
    return complete
