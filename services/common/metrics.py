"""The Prometheus endpoint of a service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, start_http_server

from services.common.lifecycle import StartError


class MetricsEndpoint:
    """Serves a registry over HTTP on a thread of its own.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        registry: What to serve.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise StartError(
                f"cannot listen on {host}:{port} for metrics: {error.strerror}; choose another --metrics-port"
            ) from None
        self.address = f"{host}:{self._server.server_port}"

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
