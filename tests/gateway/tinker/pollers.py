"""Polls as each kind of Tinker client sends them."""

import httpx

PROTOBUF = "application/x-protobuf"
# as the clients send them
SDK_38 = {
    "X-Tinker-Request-Type": "Sample",
    "X-Tinker-Request-Iteration": "0",
    "X-Stainless-Raw-Response": "raw",
    "x-stainless-read-timeout": "45.0",
    "Accept": PROTOBUF,
}
SDK_22 = {**SDK_38, "Accept": f"{PROTOBUF}, application/json"}
MINT_SCRIPT = {"X-Stainless-Raw-Response": "raw", "Accept": "application/json"}
PLAIN = {"Accept": "application/json"}


async def poll(http: httpx.AsyncClient, headers: dict[str, str]) -> httpx.Response:
    body = {"request_id": "r", "allow_metadata_only": True}
    return await http.post("retrieve_future", json=body, headers=headers)
