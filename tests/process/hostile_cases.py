"""HTTP as an attacker or a broken client writes it, with the answers that each case must get."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MIB = 1 << 20
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"  # an answer to this one is a smuggled request
ENTRY = "/v1/completions"
COMPLETION = b'{"model": "mock", "prompt": [1, 2, 3], "max_tokens": 2}'


@dataclass(frozen=True, slots=True)
class Case:
    """What is sent on one connection, and the statuses that come back before it is closed.

    ``endless`` is repeated until the server has had enough, up to ``most`` bytes. ``ending`` says
    what the client does then: wait for the server, end its half, or reset the connection.
    """

    name: str
    sent: bytes
    statuses: tuple[int, ...]
    endless: bytes = b""
    most: int = 0
    ending: str = "wait"


def head(*lines: bytes, line: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    """A request's head with a Host, ended."""
    return b"\r\n".join([line, b"Host: localhost", *lines, b"", b""])


def get(target: bytes, *lines: bytes, method: bytes = b"GET") -> bytes:
    """A request without a body."""
    return head(*lines, line=method + b" " + target + b" HTTP/1.1")


def post(body: bytes, *lines: bytes, path: bytes = b"/v1/completions") -> bytes:
    """A request with a body and its length."""
    line = b"POST " + path + b" HTTP/1.1"
    return head(b"Content-Length: %d" % len(body), *lines, line=line) + body


def chunked(body: bytes, *lines: bytes) -> bytes:
    """A request whose body is in chunks, as they are given."""
    return head(b"Transfer-Encoding: chunked", *lines) + body


def chunk(data: bytes) -> bytes:
    """One well-made chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def lengths() -> Iterator[Case]:
    """Where a body ends: two opinions are one too many."""
    te, cl = b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(HIDDEN)
    end = b"0\r\n\r\n"
    yield Case("length-and-chunks", head(cl, te) + end + HIDDEN, (400,))
    yield Case("chunks-and-length", head(te, b"Content-Length: 4") + end + HIDDEN, (400,))
    yield Case("two-equal-lengths", head(cl, cl) + HIDDEN, (400,))
    yield Case("two-lengths", head(cl, b"Content-Length: 0") + HIDDEN, (400,))
    for name, value in {
        "list": b"5, 5",
        "plus": b"+5",
        "minus": b"-1",
        "hex": b"0x5",
        "gap": b"5 5",
        "none": b"",
        "underscore": b"1_0",
        "other-digits": "\uff15".encode(),
        "fraction": b"5.0",
        "overflow": b"9" * 40,
    }.items():
        yield Case(f"length-{name}", head(b"Content-Length: " + value) + HIDDEN, (400,))
    for name, value in {
        "identity": b"identity",
        "chunked-then-identity": b"chunked, identity",
        "unknown": b"xchunked",
        "vertical-tab": b"\x0bchunked",
        "quoted": b'"chunked"',
        "twice": b"chunked, chunked",
    }.items():
        sent = head(b"Transfer-Encoding: " + value, cl) + end + HIDDEN
        yield Case(f"coding-{name}", sent, (400,))
    yield Case("coding-space-before-colon", head(b"Transfer-Encoding : chunked", cl) + end, (400,))
    yield Case("coding-two-headers", head(te, b"Transfer-Encoding: identity") + end, (400,))
    yield Case("coding-folded", head(cl, b"Transfer-Encoding:", b" chunked") + end, (400,))
    yield Case("coding-underscore", head(b"Transfer_Encoding: chunked", cl) + HIDDEN, (400,))
    old = head(te, line=b"POST /v1/completions HTTP/1.0")
    yield Case("coding-in-http-1.0", old + end + HIDDEN, (400,))


def lines() -> Iterator[Case]:
    """Lines that end, or are made, as they must not."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    for name, header in {
        "folded": b"X-One: 1\r\n two",
        "first-is-folded": b" X-One: 1",
        "bare-cr": b"X-One: 1\rX-Two: 2",
        "bare-cr-at-end": b"X-One: 1\r\r",
        "nul": b"X-One: 1\x002",
        "control": b"X-One: \x01",
        "delete": b"X-One: \x7f",
        "name-with-space": b"X One: 1",
        "name-with-bracket": b"X(One): 1",
        "name-of-other-letters": "X-\u00dcne: 1".encode(),
        "no-name": b": 1",
        "no-colon": b"X-One",
    }.items():
        yield Case(f"header-{name}", request + header + b"\r\n\r\n", (400,))
    yield Case("bare-lf", request.replace(b"\r\n", b"\n") + b"\n", (400,))
    yield Case("lf-after-headers", request + b"\n", (400,))
    yield Case("bare-lf-hides-a-request", request + b"X: 1\n\n" + HIDDEN, (400,))


def chunks() -> Iterator[Case]:
    """Bodies in chunks."""
    end = b"0\r\n\r\n"
    well = chunk(COMPLETION)
    yield Case("chunks-well-made", chunked(well + end), (200,))
    yield Case("chunk-extension", chunked(well.replace(b"\r", b";a=b\r", 1) + end), (200,))
    yield Case("chunk-trailers", chunked(well + b"0\r\nX-One: 1\r\n\r\n"), (200,))
    yield Case("length-in-trailers", chunked(well + b"0\r\nContent-Length: 5\r\n\r\n"), (400,))
    for name, size in {
        "overflow": b"f" * 17,
        "minus": b"-1",
        "hex-mark": b"0x5",
        "none": b"",
        "word": b"five",
        "gap": b"5 5",
    }.items():
        yield Case(f"chunk-size-{name}", chunked(size + b"\r\nhello\r\n" + end), (400,))
    yield Case("chunk-bare-lf", chunked(b"5\nhello\n0\n\n"), (400,))
    yield Case("chunk-too-long", chunked(b"5\r\nhelloX\r\n" + end), (400,))
    yield Case("chunk-extension-with-lf", chunked(b"5;a\nb\r\nhello\r\n" + end), (400,))
    yield Case("chunk-of-a-gigabyte", chunked(b"40000000\r\n"), (413,), b"x" * MIB, 100 * MIB)
    # six bytes for each of the 8 MiB that it takes, then the 64 MiB that it drops
    yield Case("chunks-of-a-byte", chunked(b""), (413,), chunk(b" ") * 10_000, 160 * MIB)
    yield Case("chunk-extension-endless", chunked(b"5;"), (), b"x" * MIB, 100 * MIB)
    yield Case(
        "trailers-endless", chunked(well + b"0\r\n"), (), b"X-One: 1\r\n" * 10_000, 100 * MIB
    )
    yield Case("junk-after-the-end", chunked(well + end + b"junk\r\n\r\n"), ())


def sizes() -> Iterator[Case]:
    """Too much of something; the server ends the connection long before it has all of it."""
    most = 100 * MIB
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    yield Case("header-of-100-mib", start + b"X-Long: ", (), b"x" * MIB, most)
    yield Case("header-name-of-100-mib", start, (), b"x" * MIB, most)
    yield Case("headers-of-100-mib", start, (), b"X-One: 1\r\n" * 10_000, most)
    yield Case("target-of-100-mib", b"GET /", (), b"x" * MIB, most)
    yield Case("method-of-100-mib", b"", (400,), b"X" * MIB, most)
    yield Case("empty-lines", b"", (), b"\r\n" * 100_000, most)
    yield Case("too-many-fields", head(*[b"X-%d: 1" % n for n in range(1_000)]), ())
    yield Case(
        "fields-that-are-many", get(b"/health", *[b"X-%d: 1" % n for n in range(90)]), (200,)
    )
    yield Case("target-of-100-kib", get(b"/" + b"x" * 100_000), ())
    yield Case("query-of-30-kib", get(b"/health?" + b"x" * 30_000), (200,))
    yield Case("announced-too-large", head(b"Content-Length: %d" % (1 << 40)), (413,))
    yield Case("body-too-large", post(b" " * 9 * MIB), (413,))
    yield Case("body-of-commas", post(b"[" + b"1," * 2_000_000 + b"1]"), (413,))


def pace() -> Iterator[Case]:
    """Slow, silent, and gone."""
    yield Case("silence", b"", ())
    yield Case("silence-in-the-first-line", b"GET /hea", ())
    yield Case("silence-in-a-header", b"GET /health HTTP/1.1\r\nHost: loc", ())
    yield Case("silence-before-the-body", head(b"Content-Length: 100"), (400,))
    yield Case("silence-in-the-body", head(b"Content-Length: 100") + b'{"mod', (400,))
    yield Case("silence-in-a-chunk", chunked(b"ff\r\n{"), (400,))
    yield Case("silence-in-a-chunk-size", chunked(b"f"), (400,))
    for ending in ("end", "reset"):
        yield Case(f"{ending}-in-the-first-line", b"GET /hea", (), ending=ending)
        yield Case(f"{ending}-in-a-header", b"GET /health HTTP/1.1\r\nHo", (), ending=ending)
        sent = head(b"Content-Length: 100") + b'{"mod'
        yield Case(f"{ending}-in-the-body", sent, (), ending=ending)
        yield Case(f"{ending}-in-a-chunk", chunked(b"ff\r\n{"), (), ending=ending)
        stream = COMPLETION[:-2] + b'0000, "stream": true}'
        yield Case(f"{ending}-while-it-streams", post(stream), (), ending=ending)
    request = get(b"/health")
    yield Case("two-at-once", request + request, ())
    yield Case("a-thousand-at-once", request * 1_000, ())
    yield Case("body-and-next-at-once", post(COMPLETION) + HIDDEN, ())


def versions() -> Iterator[Case]:
    """Other protocols."""
    old = b"GET /health HTTP/1.0\r\n\r\n"
    yield Case("http-1.0", old, (200,))
    yield Case("http-0.9", b"GET /health\r\n\r\n", (400,))
    yield Case("http-1.1-without-host", b"GET /health HTTP/1.1\r\n\r\n", (400,))
    yield Case("two-hosts", get(b"/health", b"Host: elsewhere"), (400,))
    for version in (b"HTTP/9.9", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"HTTP/1", b"HTP/1.1"):
        line = b"GET /health " + version
        yield Case(f"version-{version.decode()}", head(line=line), (400,))
    yield Case("http-2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,))
    yield Case("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), (400,))
    yield Case("ssh", b"SSH-2.0-OpenSSH_9.9\r\n", (400,))
    yield Case("zeros", bytes(1_000), (400,))
    yield Case("high-bytes", b"\xff" * 1_000, (400,))
    yield Case("two-spaces", head(line=b"GET  /health HTTP/1.1"), (200,))
    yield Case("tab-for-a-space", head(line=b"GET\t/health HTTP/1.1"), (400,))
    expect = post(COMPLETION, b"Expect: 100-continue")
    yield Case("expect-100", expect, (100, 200))
    yield Case("expect-nonsense", post(COMPLETION, b"Expect: a-miracle"), (200,))
    offer = (b"Connection: Upgrade", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")
    yield Case("upgrade-h2c", post(COMPLETION, *offer), (200,))
    socket = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13")
    yield Case("upgrade-websocket", get(b"/health", *socket), (200,))


def targets() -> Iterator[Case]:
    """Paths and methods."""
    for target, status in (
        (b"http://elsewhere/health", 400),
        (b"http://localhost@elsewhere/health", 400),
        (b"localhost:80", 400),
        (b"*", 400),
        (b"/../../etc/passwd", 404),
        (b"/%2e%2e/%2e%2e/etc/passwd", 404),
        (b"/v1/models/../../../etc/passwd", 404),
        (b"/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        (b"/v1/models/%00", 404),
        (b"/%00", 404),
        (b"/v1/models/%ff%fe", 404),
        (b"/v1/models/%", 404),
        (b"/v1/models/%u0041", 404),
        (b"/..\\..\\etc\\passwd", 404),
        (b"/health%2f", 200),
        (b"//health", 404),
        (b"//elsewhere/health", 404),
        (b"/health;a=b", 404),
        (b"/health/../v1/models", 404),
        (b"/HEALTH", 404),
        (b"/api/v1/samplers/" + b"%41" * 5_000, 404),
        (b"/v1/requests/%0d%0aX-Evil:%201/events", 400),
        (b"/health#x", 200),
    ):
        yield Case(f"target-{target[:40].decode()}", get(target), (status,))
    yield Case("target-raw-bytes", get(b"/\xc3\xa9"), (400,))
    yield Case("target-empty", head(line=b"GET  HTTP/1.1"), (400,))
    for method, status in (
        (b"TRACE", 405),
        (b"DELETE", 405),
        (b"OPTIONS", 405),
        (b"PURGE", 405),
        (b"PROPFIND", 405),
        (b"get", 400),
        (b"FOO", 400),
        (b"G\x00T", 400),
    ):
        name = f"method-{method.decode()!a}"
        yield Case(name, get(b"/health", method=method), (status,))
    yield Case("method-HEAD", get(b"/health", method=b"HEAD"), (200,))
    yield Case("connect", get(b"elsewhere:443", method=b"CONNECT"), (400,))
    yield Case("connect-to-a-path", get(b"/health", method=b"CONNECT"), (405,))


def bodies() -> Iterator[Case]:
    """JSON that is none, or too much of it."""
    for name, body in {
        "empty": b"",
        "bad-utf-8": b'{"model": "\xff"}',
        "overlong-utf-8": b'{"model": "\xc0\xaf"}',
        "byte-order-mark": b"\xef\xbb\xbf" + COMPLETION,
        "utf-16": COMPLETION.decode().encode("utf-16"),
        "half-a-surrogate": COMPLETION.replace(b"mock", b"\\ud800"),
        "zero-byte": COMPLETION + b"\x00",
        "two-values": COMPLETION * 2,
        "comment": b"/* */" + COMPLETION,
        "single-quotes": COMPLETION.replace(b'"', b"'"),
        "last-comma": COMPLETION.replace(b"}", b",}"),
        "deep-list": b"[" * 1_000_000,
        "deep-object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "deep-prompt": b'{"model": "mock", "prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        "deep-unknown": b'{"metadata": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        "nan": COMPLETION.replace(b"2}", b"NaN}"),
        "minus-infinity": COMPLETION.replace(b"2}", b"-Infinity}"),
        "huge-exponent": COMPLETION.replace(b"2}", b"1e999999999}"),
        "million-digits": COMPLETION.replace(b"2}", b"9" * 1_000_000 + b"}"),
        "million-digits-in-a-prompt": COMPLETION.replace(b"[1,", b"[" + b"9" * 1_000_000 + b","),
        "form": b"model=mock&prompt=hi",
        "multipart": b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nmock\r\n--x--',
        "xml": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
        "many-keys": b"{" + b",".join(b'"k%d": 1' % n for n in range(50_000)) + b"}",
        "million-samples": COMPLETION.replace(b"2}", b'2, "n": 1000000000}'),
    }.items():
        yield Case(f"body-{name}", post(body), (400,))
    twice = COMPLETION.replace(b'"mock",', b'"no-such-model", "model": "mock",')
    yield Case("body-key-twice", post(twice), (400,))
    gzip = b"Content-Encoding: gzip"
    yield Case("body-compressed", post(zlib.compress(COMPLETION, wbits=31), gzip), (400,))
    bomb = zlib.compress(bytes(100 * MIB), wbits=31)
    yield Case("body-compression-bomb", post(bomb, gzip), (400,))
    for host in (b"elsewhere", b"elsewhere:80", b"localhost.elsewhere", b"", b"[", b"\xff"):
        sent = b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
        yield Case(f"host-{host!a}", sent, (403,))
    for host in (
        b"localhost:1",
        b"LOCALHOST",
        b"127.0.0.1",
        b"[::1]:8080",
        b"10.1.2.3",
        b"a.localhost.",
    ):
        sent = b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
        yield Case(f"host-{host!a}", sent, (200,))


CASES = (
    *lengths(),
    *lines(),
    *chunks(),
    *sizes(),
    *pace(),
    *versions(),
    *targets(),
    *bodies(),
)
