"""Reserves the port that the workers share."""

from __future__ import annotations

import socket

from scalellm.services.common.addresses import bound_socket, join_address
from scalellm.services.common.lifecycle import StartError


class PortReservation:
    """Reserves an address without listening on it, so that only this process's workers listen there.

    SO_REUSEPORT lets any process of the same user listen on the port, including a second service that was started by
    mistake. So the port is first bound without it, which fails if another process has it, and then opened to the
    workers.

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        option: Name of the command-line option, for messages.

    Raises StartError if the port is in use, or the address is not this machine's.
    """

    def __init__(self, host: str, port: int, option: str = "--port") -> None:
        try:
            self._socket = bound_socket(host, port)
        except socket.gaierror as error:
            raise StartError(f"--host: {host!r} is not an address to listen on: {error.strerror}") from None
        except OSError:
            raise StartError(
                f"cannot listen on {join_address(host, port)}: the port is in use or the address is not this "
                f"machine's; stop the other process or choose another {option}"
            ) from None
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Release the port."""
        self._socket.close()
