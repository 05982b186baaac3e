"""Reserves the port that the workers share."""

from __future__ import annotations

import socket

from scalellm.services.common.addresses import bound_socket, join_address
from scalellm.services.common.lifecycle import StartError


class PortReservation:
    """Holds an address without listening on it, so that only this process's workers can.

    SO_REUSEPORT lets any process of the same user listen beside ours, also a second service that was started by
    mistake. So the port is bound first without it, which fails if anybody else is there, and opened to the workers
    after that.

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        option: Its option, for messages.

    Raises StartError when somebody else has the port or the address is not this machine's.
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
        """Give the port up."""
        self._socket.close()
