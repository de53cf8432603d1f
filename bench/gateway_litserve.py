"""LitServe with the fake engine inside, for bench.gateway; runs in the peers' environment.

The engine is that of gateway_fake: the model "fast" answers at once, "paced" takes a step a token.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

import litserve
import litserve.server

STEP_MS = 20


# LitServe is in the peers' environment only, so nothing is known of its classes here.
class FakeEngine(litserve.LitAPI):  # type: ignore[misc]
    """As many words as were asked for."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    async def decode_request(self, request: Any, context: dict[str, Any]) -> Any:
        return request

    async def predict(self, request: Any, context: dict[str, Any]) -> AsyncIterator[str]:
        wish = request if hasattr(request, "max_tokens") else context
        num_tokens = getattr(wish, "max_tokens", None) or context["max_tokens"]
        is_paced = (getattr(wish, "model", None) or context["model"]) == "paced"
        clock = asyncio.get_running_loop().time
        started = clock()
        for index in range(num_tokens):
            if is_paced:
                due = started + (index + 1) * STEP_MS / 1000
                await asyncio.sleep(max(0.0, due - clock()))
            yield " word"

    async def encode_response(
        self, output: AsyncIterator[str], context: dict[str, Any]
    ) -> AsyncIterator[dict[str, str]]:
        async for word in output:
            yield {"role": "assistant", "content": word}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    # LitServe would offer the tools of an MCP of version 1, and LiteLLM brings version 2.
    litserve.server._MCP_AVAILABLE = False
    api = FakeEngine(enable_async=True, spec=litserve.OpenAISpec())
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="error",
    )


if __name__ == "__main__":
    main()
