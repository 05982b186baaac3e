"""Bad input by HTTP: the right status, within bounds, and a service that stays healthy."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from service_processes import PATIENCE, eventually

CHAT = "/v1/chat/completions"
HELLO = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}'


def request(
    body: bytes = HELLO, *more: str, path: str = CHAT, version: str = "1.1", length: str | None = None
) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", "content-type: application/json", *more]
    if length != "":
        lines.append(f"content-length: {length or len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*chunks: bytes) -> bytes:
    parts = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return request(parts + b"0\r\n\r\n", "transfer-encoding: chunked", length="")


async def exchange(address: str, data: bytes, answers: int = 1) -> bytes:
    """Return all bytes that come back until the server closes, or until `answers` answers are there."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    found = b""
    try:
        writer.write(data)
        await writer.drain()
        while (part := await asyncio.wait_for(reader.read(2**16), PATIENCE)) or not found:
            found += part
            if not part or (len(statuses(found)) >= answers and found.endswith(b"}")):
                break
    except ConnectionError:
        pass
    finally:
        writer.close()
    return found


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


FIELDS = {
    "broken JSON": (b"{", "body"),
    "not an object": (b"[1]", "body"),
    "deep JSON": (b'{"messages": ' + b"[" * 10**6, "body"),
    "keys that come twice": (b'{"max_tokens": 1, "max_tokens": 2}', "body"),
    "NaN": (b'{"temperature": NaN}', "body"),
    "broken UTF-8": (b'{"messages": "\xc3\x28"}', "body"),
    "half a surrogate": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "messages[0].content"),
    "an endless number": (b'{"seed": ' + b"1" * 10**5 + b"}", "body"),
    "a huge number": (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "Hi"}]}', "temperature"),
    "many objects": (b'{"messages": [' + b",".join([b"{}"] * 10**5) + b"]}", "body"),
    "many messages": (
        b'{"messages": [' + b",".join([b'{"role": "user", "content": "a"}'] * 2000) + b"]}",
        "messages",
    ),
    "a long role": (json.dumps({"messages": [{"role": "r" * 10**6, "content": "a"}]}).encode(), "messages[0].role"),
    "no room": (json.dumps({"messages": [{"role": "user", "content": "a " * 10**4}]}).encode(), "messages"),
}


@pytest.mark.parametrize("name", FIELDS)
async def test_a_bad_body_is_400_and_names_what_is_wrong(http, scheduler, name):
    body, param = FIELDS[name]
    for data in (request(body, "connection: close"), chunked(body[:1000], body[1000:] or b" ")):
        answer = await exchange(http.base.removeprefix("http://"), data)
        assert statuses(answer)[0] == 400
        error = json.loads(answer.split(b"\r\n\r\n", 1)[1].split(b"HTTP/1.1", 1)[0])["error"]
        assert error["param"] == param
        assert len(error["message"]) < 400
    assert scheduler.submits == []
    assert (await http.get("/health")).status == 200


PROTOCOL = {
    "no HTTP": (b"\x00\x01\x02\x03\r\n\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "a long line": (b"GET /" + b"a" * 10**5 + b" HTTP/1.1\r\n\r\n", [400]),
    "a long header": (request(HELLO, "x: " + "a" * 10**5), [400]),
    "many headers": (request(HELLO, *(f"x{i}: a" for i in range(1000))), [400]),
    "a header without a name": (request(HELLO, ": a"), [400]),
    "a negative length": (request(length="-1"), [400]),
    "a length that is none": (request(length="1e3"), [400]),
    "two lengths": (request(HELLO, "content-length: 5"), [400]),
    "a length and chunks": (request(b"0\r\n\r\n", "transfer-encoding: chunked"), [400]),
    "a chunk that is none": (request(b"zz\r\n{}\r\n0\r\n\r\n", "transfer-encoding: chunked", length=""), [400]),
    "an endless body": (request(b"{" * 4_000_000), [413]),
    "endless chunks": (chunked(*[b" " * 2**16] * 64), [413]),
    "a compressed body": (request(HELLO, "content-encoding: gzip"), [415]),
    "no such path": (request(path="/v1/chat"), [404]),
    "another method": (b"DELETE /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", [405]),
    "a path of dots": (b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", [404]),
    "a deadline that is none": (request(HELLO, "request-timeout-ms: soon"), [400]),
    "a deadline that has passed": (request(HELLO, "request-timeout-ms: -1"), [400]),
    "a deadline of NaN": (request(HELLO, "x-stainless-read-timeout: nan"), [400]),
    "pipelining": (request(b"{") + request() + request(path="/nothing"), [400, 200, 404]),
    "HTTP/1.0": (request(version="1.0"), [200]),
}


@pytest.mark.parametrize("name", PROTOCOL)
async def test_a_bad_request_has_its_status(http, scheduler, name):
    data, wanted = PROTOCOL[name]
    found = statuses(await exchange(http.base.removeprefix("http://"), data, len(wanted)))
    # A client that sends on after the answer may lose it: then it was cut off.
    assert found[: len(wanted)] == wanted or (found == [] and len(data) > 10**5)
    assert (await http.get("/health")).status == 200


async def test_connections_that_come_and_go_leave_nothing(http, service, scheduler):
    worker = next(child for child in service.children() if "scalellm.services.tokenizer.worker" in child.cmdline())
    await http.post(CHAT, json.loads(HELLO))
    before = worker.num_fds()
    host, port = http.base.removeprefix("http://").rsplit(":", 1)
    half_open = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
    for number, (_, writer) in enumerate(half_open):
        writer.write(request()[: number % 150])
        writer.close()
    await eventually(lambda: worker.num_fds() <= before + 5)  # the worker may have opened some for itself
    assert (await http.post(CHAT, json.loads(HELLO))).status == 200
