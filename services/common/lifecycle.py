"""The gRPC server of a service: port, limits, reflection, health, signals, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health, health_pb2_grpc

from scalellm.services.common.addresses import join_address
from scalellm.services.common.health import HealthReporter
from scalellm.services.common.new_file import write_new
from scalellm.services.common.reflection import add_reflection

MAX_FRAME_BYTES = 16 * 2**20
"""Most bytes of a message between services. The tokenizer sets its own, smaller limits for messages of clients."""

MAX_METADATA_BYTES = 16 * 2**10

_UNLIMITED = 2**31 - 1

LAST_WORDS = 0.2
"""Seconds between the end of the work and the end of the connections, in which the last statuses and frames are
sent."""

# A peer that vanishes without closing its connection (a host that lost power) is noticed within half a minute.
KEEPALIVE_OPTIONS = (("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000))

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    *KEEPALIVE_OPTIONS,
    # Reconnecting is the link's business: gRPC's shared back-off would delay it by up to two minutes.
    ("grpc.use_local_subchannel_pool", 1),
    # Services are dialled as they stand: web proxies do not carry HTTP/2 streams.
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS = (
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    # Allow no compression (only algorithm 0, none): a few bytes could expand to a message of any length.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    *KEEPALIVE_OPTIONS,
    # Calls that wait for the event loop to take them: beyond 1000, over all connections, gRPC ends some at random, with
    # a bare CANCELLED. They are bounded all the same: a connection has no more of them than it may have calls open,
    # also when its client resets them as fast as it can.
    ("grpc.server.max_pending_requests", _UNLIMITED),
    ("grpc.server.max_pending_requests_hard_limit", _UNLIMITED),
    ("grpc.keepalive_permit_without_calls", 1),
    # Pings are answered however many there are: 100,000 cost 0.02 CPU seconds. A client that does not read is not read.
    # To cut off a client that pings too often costs 10: each ping too many that was read with it lengthens a text.
    ("grpc.http2.max_ping_strikes", 0),
)


class StartError(Exception):
    """The service cannot start. The message is one line that says why and what to change."""


class GrpcService:
    """One gRPC server with health and reflection.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        services: Full names of the services it serves, for health and reflection.
        is_ready: Returns whether the service can serve now.
        share_port: True if other processes may listen on the same port (worker processes).
        options: gRPC options, which replace those of SERVER_OPTIONS with the same names.
        credentials: Credentials for TLS; None: plaintext.
        interceptors: Interceptors of all calls.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        services: Sequence[str],
        is_ready: Callable[[], bool],
        share_port: bool = False,
        options: Sequence[tuple[str, int]] = (),
        credentials: grpc.ServerCredentials | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self.server = grpc.aio.server(
            interceptors=interceptors,
            options=list({**dict(SERVER_OPTIONS), "grpc.so_reuseport": int(share_port), **dict(options)}.items()),
        )
        self.health = HealthReporter(services, is_ready)
        self._host = host
        self._port = port
        self._services = services
        self._credentials = credentials
        self._health_task: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Listen. Raises StartError when the port is taken."""
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, self.server)
        add_reflection(self.server, (*self._services, health.SERVICE_NAME))
        target = join_address(self._host, self._port)
        try:
            if self._credentials is not None:
                port = self.server.add_secure_port(target, self._credentials)
            else:
                port = self.server.add_insecure_port(target)
        except RuntimeError:
            raise StartError(
                f"cannot listen on {target}: the port is in use or the address is not this machine's; "
                "stop the other process or choose another --port"
            ) from None
        await self.server.start()
        self._port = port
        self.address = join_address(self._host, port)
        await self.health.publish()
        self._health_task = asyncio.create_task(self.health.run())

    async def stop(self, grace: float) -> None:
        """Let handlers refuse calls and finish their answers for `grace` seconds, then close the listener and abort all
        connections.

        gRPC's own stop would close the listener and answer new calls on open connections with CANCELLED, which clients
        do not retry. On an aborted connection, these calls end with UNAVAILABLE.
        """
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
            await asyncio.sleep(grace)
            # The listener is closed first, because the connection of a client that connects later would not be aborted.
            _shut_down(psutil.CONN_LISTEN, self._port)
            _shut_down(psutil.CONN_ESTABLISHED, self._port)
        await self.server.stop(None)


def _shut_down(status: str, port: int) -> None:
    """Shut down this process's sockets on `port` that are in a TCP state. Data that was written before still arrives.

    On systems that do not support that for listeners, such as macOS, a listener stays open until gRPC closes it.
    """
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == status and connection.laddr.port == port:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as ours:
                ours.shutdown(socket.SHUT_RDWR)


def announce(path: Path | None, *lines: str) -> None:
    """Write the addresses on which the service listens to a file, atomically, for the process that started the service.
    Raises StartError.
    """
    if path is None:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        write_new(partial, "".join(f"{line}\n" for line in lines), 0o644)
        partial.replace(path)
    except OSError as error:
        raise StartError(f"cannot write {path}: {error.strerror}; choose another --announce") from error


def stop_event() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set. A second signal ends the process at once."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return event
