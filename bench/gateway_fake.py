"""A fake OpenAI server, as cheap as Python makes it: the engine behind the peers' gateways.

Answers of the model "fast" come at once, those of "paced" a token every STEP_MS, the first one
after one step as from a real engine. Each token is a write of its own. Everything but a POST is
answered with a list of the two models, which pleases every health check. Prints its port.
"""

import asyncio
import socket
from typing import cast

import httptools
import orjson
import uvloop

STEP_MS = 20
FAST, PACED = "fast", "paced"

_JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"fast",'
    b'"choices":[{"index":0,"delta":{%b},"logprobs":null,"finish_reason":%b}]}\n\n'
)
_FIRST = _EVENT % (b'"role":"assistant","content":" word"', b"null")
# two of them, as LiteLLM ends a stream that repeats itself
_NEXT = tuple(_EVENT % (b'"content":"%b"' % word, b"null") for word in (b" more", b" word"))
_LAST = _EVENT % (b"", b'"length"') + b"data: [DONE]\n\n"
_MODELS = orjson.dumps(
    {"object": "list", "data": [{"id": name, "object": "model"} for name in (FAST, PACED)]}
)


class FakeServer(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._parser = httptools.HttpRequestParser(self)
        self._loop = asyncio.get_running_loop()
        self._body = b""

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:  # some ask by HTTP/2 whether gRPC is spoken here
            self._transport.close()

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._parser.get_method() != b"POST":
            self._transport.write(_JSON_HEAD % len(_MODELS) + _MODELS)
            return
        wish = orjson.loads(self._body)
        step_s = STEP_MS / 1000 if wish["model"] == PACED else 0.0
        num_tokens = wish.get("max_tokens") or wish["max_completion_tokens"]
        if wish.get("stream"):
            self._transport.write(_SSE_HEAD)
            self._stream(0, num_tokens, step_s, self._loop.time())
        else:
            self._loop.call_later(step_s * num_tokens, self._answer, num_tokens)

    def _answer(self, num_tokens: int) -> None:
        body = orjson.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": "fast",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": " word" * num_tokens},
                        "finish_reason": "length",
                    }
                ],
                "usage": {
                    "prompt_tokens": 10,
                    "completion_tokens": num_tokens,
                    "total_tokens": 10 + num_tokens,
                },
            }
        )
        self._transport.write(_JSON_HEAD % len(body) + body)

    def _stream(self, index: int, num_tokens: int, step_s: float, started: float) -> None:
        """Send what is due, and come again for the rest."""
        if self._transport.is_closing():
            return
        while index < num_tokens:
            due = started + (index + 1) * step_s
            if due > self._loop.time():
                again = (index, num_tokens, step_s, started)
                self._loop.call_at(due, self._stream, *again)
                return
            self._write_chunk(_NEXT[index % 2] if index else _FIRST)
            index += 1
        self._write_chunk(_LAST)
        self._transport.write(b"0\r\n\r\n")

    def _write_chunk(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


async def serve() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2_048)
    server = await asyncio.get_running_loop().create_server(FakeServer, sock=listener)
    print(listener.getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
