"""The HTTP server of a metrics endpoint, with a thread per request, plaintext or TLS."""

from __future__ import annotations

import socket
import ssl
import threading
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from scalellm.services.common.addresses import bound_socket, join_address
from scalellm.services.common.reload import Reloaded
from scalellm.services.common.tls import TlsFiles, server_context


class MetricsServer:
    """Answers from a thread of its own, until `stop`.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        registry: Registry of the metrics.
        tls: TLS files of the listener.

    Attributes:
        address: host:port.

    Raises ConfigFileError, and OSError if it cannot listen.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, tls: TlsFiles) -> None:
        context = server_context(tls)

        class Server(_Server):
            tls = context

        self._server = make_server(host, port, make_wsgi_app(registry), Server, handler_class=_Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        self.address = join_address(host, self._server.server_port)

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingWSGIServer):
    tls: Reloaded[ssl.SSLContext] | None

    def server_bind(self) -> None:
        """Bind the address, of IPv4 or IPv6. The base class supports only one, and looks the host's name up."""
        self.socket.close()
        host, port = self.server_address[:2]
        self.socket = bound_socket(str(host), port)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(host), self.server_address[1]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:
            self.tls.refresh()
            # The handshake happens with the first read, in the request's own thread.
            connection = self.tls.value.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log no traceback for a client that breaks its connection off, or has no certificate."""


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # for the handshake, and between bytes

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing: scrapes are not logged."""
