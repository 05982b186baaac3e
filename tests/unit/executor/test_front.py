"""The executor's front, on a supervisor that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from link_frames import HELLO
from scalellm.services.common.link import LinkTraffic
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.front import ExecutorServicer


class Supervisor:
    """Takes links, never answers."""

    def __init__(self) -> None:
        self.port: Any = None
        self.closed: list[int] = []
        self.traffic = LinkTraffic()

    async def open_link(self, hello: bytes, port: Any) -> int:
        self.port = port
        return 7

    def close_link(self, link: int) -> None:
        self.closed.append(link)


async def hello() -> AsyncIterator[bytes]:
    yield HELLO.SerializeToString()
    await asyncio.Event().wait()


async def test_a_welcome_for_a_client_that_just_left_does_no_harm() -> None:
    supervisor = Supervisor()
    call = asyncio.create_task(ExecutorServicer(supervisor, ExecutorSettings()).Execute(hello(), None))
    while supervisor.port is None:
        await asyncio.sleep(0)
    call.cancel()
    supervisor.port.on_welcome(b"")  # before the call could say that it ends
    await asyncio.gather(call, return_exceptions=True)
    assert supervisor.closed == [7]
