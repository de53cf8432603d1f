"""Many streaming clients in one process, for somebody else to kill.

Each has a connection of its own. Says "asked" when all of them have sent their request, and
"streaming" when each has read its first token; then it reads on until its end.
"""

import argparse
import json
import selectors
import socket


def request(host: str, port: int, num_tokens: int) -> bytes:
    body = json.dumps(
        {"model": "mock", "prompt": [1, 2, 3], "max_tokens": num_tokens, "stream": True}
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    arguments = parser.parse_args()
    address = ("127.0.0.1", arguments.port)
    message = request(*address, arguments.tokens)
    selector = selectors.DefaultSelector()
    for _ in range(arguments.clients):
        client = socket.create_connection(address)
        client.sendall(message)
        selector.register(client, selectors.EVENT_READ)
    print("asked", flush=True)
    streaming = set()
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(1 << 16)
            assert data, "the gateway ended a stream"
            assert not data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), data
            if b"data: " in data and key.fd not in streaming:
                streaming.add(key.fd)
                if len(streaming) == arguments.clients:
                    print("streaming", flush=True)


if __name__ == "__main__":
    main()
