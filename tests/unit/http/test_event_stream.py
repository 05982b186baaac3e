"""A stream of events on which nothing happens for a while."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from scalellm.services.tokenizer.http.event_stream import EventStream


async def test_a_silent_stream_sends_comments_until_it_ends() -> None:
    goes_on = asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        stream = EventStream(request, silence=0.01)
        await stream.open()
        await stream.write(b"data: 1\n\n")
        await goes_on.wait()
        await stream.close(b"data: 2\n\n")
        await asyncio.sleep(0.05)  # in which no comment may follow the end
        return stream.response

    app = web.Application()
    app.router.add_get("/", serve)
    async with TestClient(TestServer(app)) as client, client.get("/") as response:
        found = b""
        while found.count(b": keep-alive\n\n") < 3:
            found += await response.content.readany()
        goes_on.set()
        found += await response.content.read()
    blocks = found.split(b"\n\n")
    assert (blocks[0], blocks[-2:]) == (b"data: 1", [b"data: 2", b""])
    assert set(blocks[1:-2]) == {b": keep-alive"}
