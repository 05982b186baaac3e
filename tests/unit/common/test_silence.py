"""Silence is counted in turns of this process's own event loop, not by the clock."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from scalellm.services.common.silence import silence_limit


async def test_what_came_while_this_process_stood_still_is_read() -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)

        def stand_still() -> None:
            theirs.send(b"!")
            time.sleep(0.3)

        async with silence_limit(0.1):
            loop.call_soon(stand_still)
            assert await loop.sock_recv(ours, 1) == b"!"


async def test_silence_ends_the_wait() -> None:
    with pytest.raises(TimeoutError):
        async with silence_limit(0.01):
            await asyncio.Event().wait()


async def test_nothing_ends_what_was_in_time() -> None:
    async with silence_limit(0.01):
        await asyncio.sleep(0)
    await asyncio.sleep(0.02)
