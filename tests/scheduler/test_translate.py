"""Every field of a request that can be wrong has its row here."""

import math
from typing import Any

import pytest

from headway.errors import HeadwayError
from headway.reasons import Reason
from headway.v1 import generation_pb2 as generation
from scheduler_svc import translate
from scheduler_svc.settings import SchedulerSettings
from tests.scheduler.world import CARD, body

SETTINGS = SchedulerSettings(max_name_chars=16, max_queue_timeout_ms=5_000)


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": fields}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "model"),
    ({"model": "x" * 17}, "model"),
    ({"tenant": "x" * 17}, "tenant"),
    ({"tenant": "a\nb"}, "tenant"),
    ({"session_id": "x" * 17}, "session_id"),
    ({"idempotency_key": "x" * 17}, "idempotency_key"),
    ({"prompt_token_ids": []}, "prompt_token_ids"),
    ({"prompt_token_ids": [1, 1_000]}, "prompt_token_ids"),
    ({"num_samples": 65}, "num_samples"),
    ({"band": 4}, "band"),
    ({"queue_timeout": translate.duration(-1)}, "queue_timeout"),
    ({"queue_timeout": translate.duration(0)}, "queue_timeout"),
    ({"execution_timeout": translate.duration(-5)}, "execution_timeout"),
    (sampling(max_tokens=0), "sampling.max_tokens"),
    (sampling(temperature=-0.1), "sampling.temperature"),
    (sampling(temperature=math.nan), "sampling.temperature"),
    (sampling(temperature=math.inf), "sampling.temperature"),
    (sampling(top_p=0.0), "sampling.top_p"),
    (sampling(top_p=1.1), "sampling.top_p"),
    (sampling(top_p=math.nan), "sampling.top_p"),
    (sampling(min_p=-0.1), "sampling.min_p"),
    (sampling(min_p=1.1), "sampling.min_p"),
    (sampling(min_p=math.nan), "sampling.min_p"),
    (sampling(stop_token_ids=[1_000]), "sampling.stop_token_ids"),
    (sampling(stop_token_ids=[1] * 65), "sampling.stop_token_ids"),
    (sampling(stop_strings=[""]), "sampling.stop_strings"),
    (sampling(stop_strings=["x"] * 17), "sampling.stop_strings"),
    (sampling(stop_strings=["é" * 129]), "sampling.stop_strings"),
    (sampling(min_tokens=5), "sampling.min_tokens"),
]


@pytest.mark.parametrize(("overrides", "field"), BAD)
def test_a_bad_field_is_named(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(HeadwayError) as caught:
        translate.request_from_proto(body(**overrides), CARD, SETTINGS)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.field == field
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    "overrides",
    [
        {"prompt_token_ids": [1] * 100},
        {"prompt_token_ids": [1] * 97},
        sampling(max_tokens=98),
        sampling(max_tokens=(1 << 32) - 1),
    ],
)
def test_what_is_above_the_context_is_too_long(overrides: dict[str, Any]) -> None:
    with pytest.raises(HeadwayError) as caught:
        translate.request_from_proto(body(**overrides), CARD, SETTINGS)
    assert caught.value.reason is Reason.PROMPT_TOO_LONG


def test_defaults_are_filled_in_and_the_original_is_left_alone() -> None:
    received = generation.GenerationRequest(model="tiny", prompt_token_ids=[1, 2, 3])
    before = received.SerializeToString()
    request, own = translate.request_from_proto(received, CARD, SETTINGS)
    assert received.SerializeToString() == before
    assert request.max_tokens == own.sampling.max_tokens == 97
    assert own.sampling.HasField("seed")
    assert request.num_samples == own.num_samples == 1
    assert request.band == own.band == SETTINGS.default_band
    assert request.queue_timeout_ms == SETTINGS.default_queue_timeout_ms
    assert request.execution_timeout_ms == SETTINGS.default_execution_timeout_ms
    assert request.body_hash == b""
    assert request.num_bytes > 97 * 4


def test_long_timeouts_are_capped() -> None:
    received = body(queue_timeout=translate.duration(10**12))
    request, own = translate.request_from_proto(received, CARD, SETTINGS)
    assert request.queue_timeout_ms == 5_000
    assert own.queue_timeout.ToMilliseconds() == 5_000


def test_the_hash_is_of_what_the_client_sent_without_its_key() -> None:
    first = body(idempotency_key="a")
    request, own = translate.request_from_proto(first, CARD, SETTINGS)
    assert request.body_hash == translate.body_hash(body(idempotency_key="b"))
    assert request.body_hash == translate.body_hash(first)
    assert request.body_hash != translate.body_hash(own), "the drawn seed is not part of it"
    assert request.body_hash != translate.body_hash(body(prompt_token_ids=[1, 2, 4]))


def test_request_ids_are_unguessable() -> None:
    ids = {translate.new_request_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(name.startswith("req_") and len(name) == 28 for name in ids)


def hashes(num_tokens: int, block_tokens: int = 4, **overrides: Any) -> tuple[int, ...]:
    own = body(prompt_token_ids=range(num_tokens), **overrides)
    return translate.prefix_hashes(own, block_tokens)


def test_prefix_hashes_are_of_whole_blocks_and_chained() -> None:
    assert hashes(3) == ()
    assert len(hashes(11)) == 2
    assert hashes(11) == hashes(8) == hashes(12)[:2]
    other = translate.prefix_hashes(body(prompt_token_ids=[9, *range(1, 12)]), 4)
    assert not set(other) & set(hashes(12)), "what follows a difference differs"
    assert all(0 <= value < 1 << 64 for value in hashes(100))


def test_prefix_hashes_are_bounded_and_of_one_tenant_and_model() -> None:
    assert len(hashes(1_000)) == 64
    assert hashes(1_000) == hashes(64 * 4)
    own = body()
    assert set(hashes(8)) == set(hashes(8, tenant=own.tenant, model=own.model))
    for others in (
        hashes(8, tenant="u"),
        hashes(8, model="x"),
        hashes(8, tenant="tt", model="iny"),
    ):
        assert not set(hashes(8)) & set(others)


def test_a_request_has_its_session_and_prefix() -> None:
    received = body(session_id="s", prompt_token_ids=[1] * 70)
    request, _ = translate.request_from_proto(received, CARD, SETTINGS)
    assert request.session_id == "s"
    block_tokens = SETTINGS.prefix_block_tokens
    assert request.prefix_hashes == translate.prefix_hashes(received, block_tokens)
    assert len(request.prefix_hashes) == 70 // block_tokens
