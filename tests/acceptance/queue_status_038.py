"""A sample that tells where it stands while it waits, by the low-level client of tinker 0.38.

The same calls as in MinT's queue_status.py, which stops at an older SDK: a sampling session that
no create_session came before, one asample, and polls that read the 408 themselves. A line of JSON
for each poll, and one for the result. Needs TINKER_API_KEY, TINKER_BASE_URL and MINT_BASE_MODEL.
"""

import asyncio
import json
import os
import time

from tinker import APIStatusError, types
from tinker._client import AsyncTinker


async def submit(client: AsyncTinker) -> str:
    session = await client.service.create_sampling_session(
        request=types.CreateSamplingSessionRequest(
            session_id=f"queue-status-{time.time_ns()}",
            sampling_session_seq_id=0,
            base_model=os.environ["MINT_BASE_MODEL"],
        )
    )
    future = await client.sampling.asample(
        request=types.SampleRequest(
            sampling_session_id=session.sampling_session_id,
            seq_id=1,
            prompt=types.ModelInput.from_ints([1] * 256),
            sampling_params=types.SamplingParams(max_tokens=128, temperature=0.7),
        )
    )
    return future.request_id


async def poll(client: AsyncTinker, request_id: str) -> float | None:
    """Seconds to wait before the next one; None when there is a result."""
    request = types.FutureRetrieveRequest(request_id=request_id)
    try:
        answer = await client.futures.with_raw_response.retrieve(request=request)
    except APIStatusError as error:
        if error.status_code != 408:
            raise
        print(json.dumps({"event": "pending", **error.response.json()}), flush=True)
        return float(error.response.headers["Retry-After"])
    print(json.dumps({"event": "finished", **json.loads(await answer.read())}), flush=True)
    return None


async def main() -> None:
    async with AsyncTinker() as client:
        request_id = await submit(client)
        pause_s: float | None = 0.0
        while pause_s is not None:
            await asyncio.sleep(pause_s)
            pause_s = await poll(client, request_id)


if __name__ == "__main__":
    asyncio.run(main())
