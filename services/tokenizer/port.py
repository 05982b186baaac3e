"""Reserves the port that the workers share."""

from __future__ import annotations

import socket

from services.common.lifecycle import StartError


class PortReservation:
    """Holds an address without listening on it, so that only this process's workers can.

    SO_REUSEPORT lets any process of the same user listen beside ours, also a second service that was started by
    mistake. So the port is bound first without it, which fails if anybody else is there, and opened to the workers
    after that.

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.

    Raises StartError when somebody else has the port or the address is not this machine's.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._socket = socket.socket(family, kind, protocol)
        except OSError as error:
            raise StartError(f"--host: {host!r} is not an address to listen on: {error.strerror}") from None
        try:
            # Connections of an earlier run that wait for their time to run out do not count as somebody else.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            self._socket.close()
            raise StartError(
                f"cannot listen on {host}:{port}: the port is in use or the address is not this machine's; "
                "stop the other process or choose another --port"
            ) from None
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Give the port up."""
        self._socket.close()
