"""The HTTP port itself: connections, TLS, and clients that take nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import trustme
from aiohttp import web
from aiohttp.http import HttpProcessingError

from certificates import Identity, issue
from scalellm.services.common.addresses import bound_socket
from scalellm.services.common.tls import PLAINTEXT, TlsFiles
from scalellm.services.tokenizer.http.connection import BoundedConnection, ConnectionLimits
from scalellm.services.tokenizer.http.listener import HttpListener
from service_processes import PATIENCE, eventually

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def hello(request: web.Request) -> web.StreamResponse:
    return web.Response(text="hello")


@asynccontextmanager
async def listening(
    handler: Handler = hello, tls: TlsFiles = PLAINTEXT, max_connections: int | None = None
) -> AsyncIterator[tuple[HttpListener, int]]:
    app = web.Application()
    app.router.add_get("/", handler)
    with bound_socket("127.0.0.1", 0) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = reserved.getsockname()[1]
        listener = HttpListener(app, "127.0.0.1", port, tls, max_connections)
        await listener.start()
        try:
            yield listener, port
        finally:
            await listener.stop()


async def ask(port: int, context: ssl.SSLContext | None = None) -> bytes:
    """The answer's first line; empty where the connection was cut off. Raises ssl.SSLError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        writer.write(GET)
        return await reader.readline()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def trusting(identity: Identity, *, shows_certificate: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(identity.ca))
    if shows_certificate:
        context.load_cert_chain(identity.cert, identity.key)
    return context


OK = b"HTTP/1.1 200 OK\r\n"


async def test_listeners_share_a_port() -> None:
    async with listening() as (first, port):
        second = HttpListener(web.Application(), "127.0.0.1", port, PLAINTEXT)
        await second.start()
        await second.stop()
        assert await ask(port) == OK
        await eventually(lambda: first.num_connections == 0)


async def test_connections_beyond_the_limit_are_closed_and_places_come_back() -> None:
    async with listening(max_connections=2) as (listener, port):
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await eventually(lambda: listener.num_connections == 2)
        assert await ask(port) == b""
        for _, writer in kept:
            writer.close()
        await eventually(lambda: listener.num_connections == 0)
        assert await ask(port) == OK


async def test_stopping_ends_open_connections() -> None:
    async with listening() as (listener, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await eventually(lambda: listener.num_connections == 1)
        await listener.stop()
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await ask(port)


async def test_stopping_ends_an_answer_that_would_never_end() -> None:
    is_cancelled = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"news")
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()
        return response

    async with listening(endless) as (listener, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await reader.readuntil(b"news")
        await asyncio.wait_for(listener.stop(), PATIENCE)
        await asyncio.wait_for(is_cancelled.wait(), PATIENCE)
        with contextlib.suppress(ConnectionResetError):  # as it was cut off in the midst
            await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()


async def test_certificates_are_replaced_without_a_restart(tmp_path: Path) -> None:
    first = issue(tmp_path / "own", trustme.CA())
    async with listening(tls=TlsFiles(first.cert, first.key)) as (_, port):
        old = trusting(first)
        assert await ask(port, old) == OK
        assert await ask(port) == b""  # no TLS
        renewed = issue(tmp_path / "own", trustme.CA())
        assert await ask(port, trusting(renewed)) == OK
        with pytest.raises(ssl.SSLError):
            await ask(port, old)
        renewed.key.write_text("half copied")
        assert await ask(port, trusting(renewed)) == OK


async def test_clients_have_to_show_a_certificate_of_todays_authorities(tmp_path: Path) -> None:
    own, stranger = issue(tmp_path / "own", trustme.CA()), issue(tmp_path / "stranger", trustme.CA())
    async with listening(tls=TlsFiles(own.cert, own.key, own.ca)) as (_, port):

        async def is_answered(shown: Identity | None) -> bool:
            context = trusting(own)
            if shown is not None:
                context.load_cert_chain(shown.cert, shown.key)
            try:
                return await ask(port, context) == OK
            except (ssl.SSLError, ConnectionError):
                return False

        assert await is_answered(own)
        assert not await is_answered(None)
        assert not await is_answered(stranger)
        own.ca.write_bytes(stranger.ca.read_bytes() + own.ca.read_bytes())
        assert await is_answered(stranger)


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True


async def test_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    due: list[Callable[[], None]] = []
    cancelled: list[object] = []

    class Loop:
        def call_later(self, delay: float, callback: Callable[[], None]) -> object:
            assert delay == 60.0
            due.append(callback)
            return type("Timer", (), {"cancel": lambda self: cancelled.append(self)})()

    monkeypatch.setattr("scalellm.services.tokenizer.http.connection.asyncio.get_running_loop", Loop)
    limits = ConnectionLimits(10)
    connection, transport = BoundedConnection(asyncio.Protocol(), limits), Transport()
    connection.connection_made(transport)
    connection.pause_writing()
    connection.resume_writing()
    assert len(cancelled) == 1
    connection.pause_writing()
    due[-1]()
    assert transport.is_aborted
    connection.connection_lost(None)
    assert len(cancelled) == 2
    assert limits.open == set()


@pytest.mark.parametrize("path", [b"/", b"/nothing"])
@pytest.mark.parametrize("value", [b"nothing", b"100-con\xa5inue"])
async def test_what_cannot_be_expected_is_refused_in_json(path: bytes, value: bytes) -> None:
    async with listening() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET %s HTTP/1.1\r\nhost: x\r\nexpect: %s\r\nconnection: close\r\n\r\n" % (path, value))
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert head.startswith(b"HTTP/1.1 417 Expectation Failed\r\n")
    error = json.loads(body)["error"]
    assert (error["param"], error["message"]) == ("expect", "expect: must be absent or 100-continue")


async def test_what_is_no_request_makes_one_error_which_is_not_kept() -> None:
    app = web.Application()
    app.router.add_get("/", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    assert runner.server is not None
    connection, transport = BoundedConnection(runner.server(), ConnectionLimits(10)), Mock(asyncio.Transport)
    gc.collect()
    gc.disable()
    try:
        before = num_errors()  # of other tests
        connection.connection_made(transport)
        connection.data_received(GET + GET)
        assert num_errors() == before
        for _ in range(10):
            connection.data_received(b"GET / HTTP/1.1\r\nx: " + b"a" * 2**16)
        assert num_errors() == before + 1
        await eventually(lambda: transport.close.called)
        connection.connection_lost(None)
        del connection
        await eventually(lambda: num_errors() <= before)
    finally:
        gc.enable()
        await runner.cleanup()


def num_errors() -> int:
    """Errors of malformed requests that are there."""
    return sum(isinstance(found, HttpProcessingError) for found in gc.get_objects())


async def test_a_client_that_keeps_its_side_open_does_not_hold_the_port_against_the_next_process() -> None:
    with socket.socket() as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        async with listening() as (_, port):
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            while await loop.sock_recv(client, 2**16):  # until the server has closed its side
                pass
        bound_socket("127.0.0.1", port).close()
