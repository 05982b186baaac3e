"""The HTTP listener of a worker, on a port that all workers share, with TLS if that is configured."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from scalellm.services.common.addresses import bound_socket, join_address
from scalellm.services.common.lifecycle import LAST_WORDS, StartError
from scalellm.services.common.tls import TlsFiles, listener_context
from scalellm.services.tokenizer.http.connection import BoundedConnection, ConnectionLimits
from scalellm.services.tokenizer.http.errors import OPENAI_ERRORS, HttpError

_IDLE = 75.0
"""Seconds within which the headers of a request must be complete, since the start of the connection or the end of the
last answer."""

_LINGER = 2.0
"""Seconds for which the rest of a refused request is read, so that its client receives the answer."""

_BACKLOG = 1024
_CONTINUE = "100-continue"

# Like gRPC's keepalive: a client that vanished without closing its connection is noticed within half a minute.
_KEEPALIVE = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 30_000))

# aiohttp logs clients' mistakes as errors with tracebacks. Our own errors are logged where they happen.
_silent = logging.getLogger(f"{__name__}.aiohttp")
_silent.disabled = True


_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class HttpListener:
    """Serves an application on a port that other processes may share.

    Args:
        app: The application.
        host: Address to listen on.
        port: Port to listen on.
        tls: TLS files of the listener.
        max_connections: Most connections; more are closed at once. None: half of the process's limit of open files.
    """

    def __init__(
        self, app: web.Application, host: str, port: int, tls: TlsFiles, max_connections: int | None = None
    ) -> None:
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_silent,
            auto_decompress=False,  # else a few compressed bytes could expand to any length
            handler_cancellation=True,
            keepalive_timeout=_IDLE,
            lingering_time=_LINGER,
            shutdown_timeout=LAST_WORDS,  # of what runs on without its connection; aiohttp takes 0 for no limit
        )
        self._host = host
        self._port = port
        self._context = listener_context(tls)
        self._limits = ConnectionLimits(max_connections or resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._server: asyncio.Server | None = None

    @property
    def num_connections(self) -> int:
        """Number of open connections."""
        return len(self._limits.open)

    async def start(self) -> None:
        """Listen. Raises StartError when the port is taken."""
        await self._runner.setup()
        make_inner = self._runner.server
        assert make_inner is not None
        make_inner.request_handler = _refusing_expectations(make_inner.request_handler)
        try:
            listener = bound_socket(self._host, self._port, shares_port=True)
        except OSError:
            raise StartError(f"cannot listen on {join_address(self._host, self._port)} for HTTP") from None
        # Connections inherit it. Those whose clients keep their side open, as browsers do, would otherwise hold the
        # port for a minute after this process was killed, against its successor.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:  # connections inherit them
            if hasattr(socket, name):
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: BoundedConnection(make_inner(), self._limits),
            sock=listener,
            ssl=self._context,
            backlog=_BACKLOG,
        )

    async def stop(self) -> None:
        """Close the port and cut all connections; handlers that still run are cancelled."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._limits.open):
            connection.cut()
        await self._runner.cleanup()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._server.wait_closed()


def _refusing_expectations(handler: _Handler) -> _Handler:
    """Wrap a handler so that an unsupported `Expect` header is refused like any other error.

    aiohttp's application would refuse it before it calls our handler, and fail with 500 if it is not UTF-8.
    """

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get(hdrs.EXPECT, _CONTINUE).lower() == _CONTINUE:
            return await handler(request)
        failure = HttpError(417, "expect: must be absent or 100-continue", field="expect")
        return web.Response(status=failure.status, body=OPENAI_ERRORS.body(failure), content_type="application/json")

    return handle
