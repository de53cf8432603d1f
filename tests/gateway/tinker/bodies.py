"""What Tinker clients send, and refusals by field."""

import json
from typing import Any

import httpx
from tinker import types

from tests.gateway.tinker_fakes import MODEL

Body = dict[str, Any]


def sample_body(**changes: Any) -> Body:
    body = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "num_samples": 1,
        "base_model": MODEL,
        "type": "sample",
    }
    return {**body, **changes}


async def sampling_session(http: httpx.AsyncClient, session_id: str = "mine", seq: int = 0) -> str:
    body = {"session_id": session_id, "sampling_session_seq_id": seq, "base_model": MODEL}
    response = await http.post("create_sampling_session", json=body)
    assert response.status_code == 200
    return types.CreateSamplingSessionResponse(**response.json()).sampling_session_id


async def refused(http: httpx.AsyncClient, path: str, body: Any, field: str) -> httpx.Response:
    """It is a 400 with a body, its length, and the field's name in it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await http.post(path, content=content)
    assert response.status_code == 400, response.text
    assert int(response.headers["content-length"]) == len(response.content) > 0
    assert field in response.text
    return response
