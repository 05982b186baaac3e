"""The upstream end of a link, without a peer."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from scalellm.v1 import link_pb2, scheduler_pb2
from service_processes import PATIENCE
from services.common.errors import StatusError
from services.common.link import LinkClient

CONNECT = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].methods_by_name["Connect"]


class Handler:
    """Counts how often the link was lost."""

    num_down = 0

    def on_up(self, welcome: link_pb2.Welcome) -> None:
        pass

    def on_step(self, step: link_pb2.StepOutput) -> None:
        pass

    def on_down(self, error: StatusError) -> None:
        self.num_down += 1


async def test_a_cancellation_that_grpc_takes_for_its_own_ends_the_link(monkeypatch) -> None:
    handler = Handler()
    client = LinkClient("127.0.0.1:1", CONNECT, link_pb2.Hello(), handler)
    connecting = asyncio.Event()

    async def connect_once() -> None:
        connecting.set()
        with suppress(asyncio.CancelledError):  # as a call does that is being prepared
            await asyncio.Event().wait()
        raise StatusError.unavailable("the call ended")

    monkeypatch.setattr(client, "_connect_once", connect_once)
    running = asyncio.create_task(client.run())
    await connecting.wait()
    running.cancel()
    await asyncio.wait((running,), timeout=PATIENCE)
    assert running.cancelled()
    assert handler.num_down == 0
