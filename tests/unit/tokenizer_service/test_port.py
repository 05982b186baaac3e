"""A reserved port is open to nobody but the workers."""

from __future__ import annotations

import contextlib
import socket

import pytest

from scalellm.services.common.lifecycle import StartError
from scalellm.services.tokenizer.port import PortReservation


def listen(port: int, *, share: bool) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(share))
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


def test_workers_share_it_and_others_do_not():
    reservation = PortReservation("127.0.0.1", 0)
    with pytest.raises(StartError, match="the port is in use"):
        PortReservation("127.0.0.1", reservation.port)
    workers = [listen(reservation.port, share=True) for _ in range(2)]
    with pytest.raises(StartError, match="choose another --port"):
        PortReservation("127.0.0.1", reservation.port)
    # Connections that linger after their server is gone do not keep the next one from starting.
    clients = [socket.create_connection(("127.0.0.1", reservation.port)) for _ in range(8)]
    for worker in workers:
        worker.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                worker.accept()[0].close()
        worker.close()
    for client in clients:
        client.close()
    port = reservation.port
    reservation.close()
    PortReservation("127.0.0.1", port).close()


@pytest.mark.parametrize("share", [True, False])
def test_a_port_that_somebody_listens_on_is_refused(share):
    with listen(0, share=share) as other, pytest.raises(StartError, match="the port is in use"):
        PortReservation("127.0.0.1", other.getsockname()[1])


def test_both_families_are_one_port_to_whoever_listens_on_all():
    with (
        listen(0, share=False) as other,
        pytest.raises(StartError, match=r"cannot listen on \[::\]:\d+: the port is in"),
    ):
        PortReservation("::", other.getsockname()[1])


def test_a_host_that_is_none_is_refused():
    with pytest.raises(StartError, match="--host: 'not a host' is not an address to listen on"):
        PortReservation("not a host", 0)
    with pytest.raises(StartError, match="not this machine's"):
        PortReservation("192.0.2.1", 0)
