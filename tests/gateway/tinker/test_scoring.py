"""Scores in Tinker's tensors: what is asked, and what the SDK reads out of the answer."""

import json
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker.proto.response_conv import deserialize_sample_response
from tinker.types import TensorData

from gateway_http.tinker_futures import finished
from gateway_http.tinker_schema import Sample, parse, to_generation
from headway.errors import HeadwayError
from headway.v1 import generation_pb2
from tests.gateway.tinker.bodies import sample_body
from tests.gateway.tinker_fakes import MODEL, SETTINGS, ScriptedScheduler, client_of, result

PROMPT = [11, 12, 13, 14]
PROTOBUF = {"accept": "application/x-protobuf"}
NAN = float("nan")


def asked(**fields: Any) -> generation_pb2.GenerationRequest:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}
    body = sample_body(prompt=prompt, **fields)
    sample = parse(json.dumps(body).encode(), Sample)
    return to_generation(sample, model=MODEL, idempotency_key="", group="", settings=SETTINGS)


def answered(scores: generation_pb2.PromptScores, note: bytes = b"", **usage: int) -> Any:
    """What the SDK makes of a result with these scores."""
    outcome = result(([5], [-1.0]))
    outcome.prompt_scores.CopyFrom(scores)
    outcome.note = note
    outcome.usage.MergeFrom(generation_pb2.Usage(num_prompt_tokens=len(PROMPT), **usage))
    return deserialize_sample_response(bytes(finished("r", outcome, PROTOBUF, None).body))


def tensor(**changes: Any) -> dict[str, Any]:
    cells = {"data": [1, -1, 3, 4, -1, -1], "dtype": "int64", "shape": [3, 2]}
    return {**cells, **changes}


# --- asking -----------------------------------------------------------------------------------


def test_every_kind_of_score_is_asked_for() -> None:
    request = asked(
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        prompt_alt_tokens_k=4,
        prompt_logprobs_last_n=1,
    )
    assert request.sampling.top_logprobs == 3
    assert request.prompt_scoring == generation_pb2.PromptScoring(
        logprobs=True, top_logprobs=2, last_n=1, num_alternatives=4
    )


def test_nothing_is_asked_about_the_prompt_unless_the_client_does() -> None:
    request = asked(prompt_logprobs=False, topk_prompt_logprobs=0, prompt_alt_tokens_k=0)
    assert not request.HasField("prompt_scoring")


def test_dense_targets_are_the_cells_that_name_a_token() -> None:
    scoring = asked(target_prompt_logprobs=tensor()).prompt_scoring
    assert list(scoring.target_token_ids) == [1, 3, 4]
    assert list(scoring.target_offsets) == [0, 1, 3, 3]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"shape": None}, "shape"),
        ({"shape": [2, 3]}, "shape"),
        ({"shape": [3, 3]}, "data"),
        ({"data": [-1] * 6}, "names no token"),
        ({"data": [-2] * 6}, "data"),
        ({"dtype": "float32"}, "dtype"),
        ({"sparse_crow_indices": [0, 1, 2, 6]}, "sparse_crow_indices"),
        ({"sparse_col_indices": [0] * 6}, "sparse_crow_indices"),
        ({"sparse_crow_indices": [0, 6], "sparse_col_indices": [0] * 6}, "sparse_crow_indices"),
        ({"sparse_crow_indices": [0, 4, 2, 6], "sparse_col_indices": [0] * 6}, "cut data"),
        ({"sparse_crow_indices": [1, 2, 3, 6], "sparse_col_indices": [0] * 6}, "cut data"),
        ({"sparse_crow_indices": [0, 2, 3, 6], "sparse_col_indices": [2] * 6}, "sparse_col"),
        ({"sparse_crow_indices": [0, 2, 3, 6], "sparse_col_indices": [0] * 5}, "sparse_col"),
    ],
)
def test_bad_targets_are_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(HeadwayError, match=field):
        asked(target_prompt_logprobs=tensor(**changes))


@pytest.mark.parametrize("fields", [{}, {"prompt_logprobs": False}, {"prompt_logprobs": None}])
def test_last_n_needs_prompt_logprobs(fields: dict[str, Any]) -> None:
    with pytest.raises(HeadwayError, match="prompt_logprobs_last_n"):
        asked(prompt_logprobs_last_n=1, **fields)


def test_last_n_is_below_the_prompts_length() -> None:
    with pytest.raises(HeadwayError, match="prompt_logprobs_last_n"):
        asked(prompt_logprobs=True, prompt_logprobs_last_n=4)


# --- answering --------------------------------------------------------------------------------


@given(cells=st.lists(st.integers(-1, 99), min_size=6, max_size=6), is_sparse=st.booleans())
def test_targets_come_back_in_their_own_shape(cells: list[int], is_sparse: bool) -> None:
    """Whatever is asked, dense or sparse, each token's answer is where the SDK looks for it."""
    ids = np.array(cells, dtype=np.int64).reshape(3, 2)
    if (ids < 0).all():
        ids[0, 0] = 7
    if is_sparse:
        rows, columns = np.nonzero(ids >= 0)
        fields = {
            "data": ids[rows, columns].tolist(),
            "dtype": "int64",
            "shape": [3, 2],
            "sparse_crow_indices": [int((rows < row).sum()) for row in range(4)],
            "sparse_col_indices": columns.tolist(),
        }
    else:
        fields = {"data": ids.ravel().tolist(), "dtype": "int64", "shape": [3, 2]}
    request = asked(target_prompt_logprobs=fields)
    scoring = request.prompt_scoring
    scores = generation_pb2.PromptScores(target_logprob=[-x / 4 for x in scoring.target_token_ids])
    read = answered(scores, request.note).target_prompt_logprobs
    assert isinstance(read, TensorData)
    assert (read.sparse_crow_indices is not None) == is_sparse
    dense = read.to_torch(pad_value=0) if is_sparse else read.to_torch()
    np.testing.assert_array_equal(dense.numpy(), np.where(ids >= 0, -ids / 4, 0.0))


def test_prompt_logprobs_and_cache_hits() -> None:
    scores = generation_pb2.PromptScores(logprob=[NAN, -1.0, -2.0, -3.0])
    read = answered(scores, num_cached_prompt_tokens=2)
    assert read.prompt_logprobs == [None, -1.0, -2.0, -3.0]
    assert read.prompt_cache_hit_tokens == 2
    assert read.topk_prompt_logprobs is None
    assert read.prompt_alt_tokens is None


@pytest.mark.parametrize("num_scored", [1, 2, 3])
def test_likeliest_tokens_of_the_scored_positions(num_scored: int) -> None:
    scores = generation_pb2.PromptScores(
        logprob=[NAN] * (4 - num_scored) + [-1.0] * num_scored,
        top_token_id=[7, 8] * num_scored,
        top_logprob=[-0.5, -1.5] * num_scored,
    )
    rows = answered(scores).topk_prompt_logprobs
    assert rows == [None] * (4 - num_scored) + [[(7, -0.5), (8, -1.5)]] * num_scored


def test_likeliest_tokens_without_logprobs_are_there_for_all_but_the_first() -> None:
    scores = generation_pb2.PromptScores(top_token_id=[7, 8, 9], top_logprob=[-1.0, -2.0, -3.0])
    assert answered(scores).topk_prompt_logprobs == [None, [(7, -1)], [(8, -2)], [(9, -3)]]


def test_drawn_alternatives() -> None:
    scores = generation_pb2.PromptScores(
        alternative_token_id=range(6), alternative_logprob=[-1.0] * 6
    )
    drawn = answered(scores).prompt_alt_tokens
    assert drawn.tokens.to_torch().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert drawn.logprobs.to_torch().tolist() == [[-1, -1]] * 3


def test_alternatives_of_sampled_tokens() -> None:
    outcome = result(([5, 6], [-1.0, -1.0]))
    outcome.samples[0].top_token_ids.extend([5, 7, 6, 8])
    outcome.samples[0].top_logprobs.extend([-1.0, -2.0, -1.0, -4.0])
    read = deserialize_sample_response(bytes(finished("r", outcome, PROTOBUF, None).body))
    assert read.sequences[0].topk_logprobs == [[(5, -1.0), (7, -2.0)], [(6, -1.0), (8, -4.0)]]


def test_scores_in_json_as_the_old_sdk_reads_them() -> None:
    outcome = result(([5], [-1.0]))
    outcome.usage.num_prompt_tokens = 3
    outcome.usage.num_cached_prompt_tokens = 1
    outcome.prompt_scores.logprob.extend([NAN, -1.0, -2.0])
    outcome.prompt_scores.top_token_id.extend([7, 8])
    outcome.prompt_scores.top_logprob.extend([-0.5, -1.5])
    body = json.loads(bytes(finished("r", outcome, {}, None).body))
    assert body["prompt_logprobs"] == [None, -1.0, -2.0]
    assert body["topk_prompt_logprobs"] == [None, [[7, -0.5]], [[8, -1.5]]]
    assert body["prompt_cache_hit_tokens"] == 1


# --- large results, clones, and one poll for many ---------------------------------------------


async def test_a_large_result_is_announced_to_those_who_allow_it() -> None:
    scheduler = ScriptedScheduler()
    num_tokens = SETTINGS.tinker_announce_bytes // 8 + 1
    scheduler.outcomes = [result(([1] * num_tokens, [-1.0] * num_tokens))]
    async with client_of(scheduler) as http:
        body = {"request_id": "r", "allow_metadata_only": True}
        first = await http.post("retrieve_future", json=body, headers=PROTOBUF)
        assert first.json()["status"] == "complete_metadata"
        body["allow_metadata_only"] = False
        second = await http.post("retrieve_future", json=body, headers=PROTOBUF)
    assert len(second.content) == first.json()["response_payload_size"]


async def session_of(http: httpx.AsyncClient) -> str:
    body = {"session_id": "s", "sampling_session_seq_id": 0, "base_model": MODEL}
    answer = await http.post("create_sampling_session", json=body)
    session: str = answer.json()["sampling_session_id"]
    return session


async def test_clones_are_numbered_inside_the_range_of_seq_ids() -> None:
    async with client_of(ScriptedScheduler()) as http:
        body = {"sampling_session_id": await session_of(http)}
        answers = [(await http.post("join_sampling_session", json=body)).json() for _ in range(9)]
        forged = await http.post("join_sampling_session", json={"sampling_session_id": "a.b"})
    counters = {answer["client_counter"] for answer in answers}
    assert len(counters) == 9
    assert all(0 < counter < 10**9 for counter in counters)
    assert answers[0]["type"] == "join_sampling_session"
    assert forged.status_code == 404


async def test_one_poll_tells_the_ends_of_one_clones_futures() -> None:
    scheduler = ScriptedScheduler()
    async with client_of(scheduler) as http:
        session = await session_of(http)
        for seq_id in (5, 3 * 10**9 + 5):
            await http.post(
                "asample",
                json={
                    "sampling_session_id": session,
                    "seq_id": seq_id,
                    "prompt": {"chunks": [{"tokens": [1]}]},
                    "sampling_params": {},
                },
            )
        first, second = (request.group for request in scheduler.submitted)
        assert first != second
        scheduler.ends[second] = [("request-1", False, 77), ("request-2", True, 5)]
        answer = await http.post(
            "retrieve_futures",
            json={
                "target": {
                    "type": "sampling_session",
                    "sampling_session_id": session,
                    "cloned_sampler_id": 3,
                },
                "prev_cursor": 0,
                "retrieved_request_ids": ["x"],
            },
        )
    assert answer.json() == {
        "completions": [
            {
                "state": "finished",
                "request_id": "request-1",
                "response_payload_uncompressed_size": 77,
            },
            {"state": "failed", "request_id": "request-2"},
        ],
        "cursor": 2,
    }
    assert scheduler.group_waits_s == [SETTINGS.tinker_hold_s]


async def test_a_poll_without_time_is_answered_at_once() -> None:
    scheduler = ScriptedScheduler()
    async with client_of(scheduler) as http:
        target = {"sampling_session_id": await session_of(http), "cloned_sampler_id": 0}
        answer = await http.post("retrieve_futures", json={"target": target, "timeout": 0.0})
    assert answer.json() == {"completions": [], "cursor": 0}
    assert scheduler.group_waits_s == [0.0]


async def test_futures_of_a_session_that_we_did_not_make_are_not_told() -> None:
    scheduler = ScriptedScheduler()
    async with client_of(scheduler) as http:
        target = {"sampling_session_id": "e30.e30"}
        response = await http.post("retrieve_futures", json={"target": target, "timeout": 0.0})
    assert response.status_code == 404
    assert scheduler.group_waits_s == []
