"""Tells systemd how a service with `Type=notify` is: sd_notify(3), a datagram to the socket that it named."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping


def notify(environment: Mapping[str, str], *lines: str) -> None:
    """Send assignments such as `READY=1`. Without effect where nobody asked for them.

    Args:
        environment: Environment of this process; NOTIFY_SOCKET is a path, or an abstract name behind an @.
        lines: The assignments.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as told:
        told.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        told.sendall("\n".join(lines).encode())
