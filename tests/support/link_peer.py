"""A raw client of a link, for tests that speak to one service directly."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from scalellm.services.common.link import token_runs
from scalellm.v1 import common_pb2, link_pb2
from service_processes import PATIENCE


class LinkPeer:
    """Opens one link, collects what comes back per handle."""

    def __init__(self, call: Any, welcome: link_pb2.Welcome) -> None:
        self._call = call
        self.welcome = welcome
        self.load = welcome.load
        self.tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.sample_reasons: dict[tuple[int, int], int] = {}
        self.finished: dict[int, link_pb2.Finish] = {}
        self.logprobs: list[link_pb2.LinkLogprobs] = []
        self.prompt_logprobs: list[link_pb2.LinkLogprobs] = []
        self.num_frames = 0
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def submit(self, handle: int, token_ids: list[int], **fields: Any) -> None:
        sampling = fields.pop("sampling", None) or common_pb2.SamplingParams(max_tokens=8, temperature=0, seed=1)
        submit = link_pb2.Submit(
            handle=handle, request_id=f"r{handle}", token_ids=token_ids, sampling=sampling, **fields
        )
        await self._call.write(link_pb2.ClientFrame(submit=submit))

    async def abort(self, handle: int, **fields: Any) -> None:
        await self._call.write(link_pb2.ClientFrame(abort=link_pb2.Abort(handle=handle, **fields)))

    async def write(self, frame: link_pb2.ClientFrame) -> None:
        await self._call.write(frame)

    async def until(self, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        async with asyncio.timeout(timeout), self._news:
            await self._news.wait_for(lambda: condition() or self._reader.done())
        assert condition(), f"the link ended first: {self._reader}"

    async def finish(self, handle: int, timeout: float = PATIENCE) -> link_pb2.Finish:
        await self.until(lambda: handle in self.finished, timeout)
        return self.finished[handle]

    async def status(self) -> grpc.StatusCode:
        """The status with which the link ends."""
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(self._reader, return_exceptions=True)
            code: grpc.StatusCode = await self._call.code()
            return code

    async def _read(self) -> None:
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                async with self._news:
                    self._take(frame.step)
                    self._news.notify_all()
        finally:
            async with self._news:
                self._news.notify_all()

    def _take(self, step: link_pb2.StepOutput) -> None:
        self.num_frames += 1
        assert sum(step.counts) == len(step.token_ids)
        for handle, index, offset, token_ids in token_runs(step):
            tokens = self.tokens[handle, index]
            assert offset == len(tokens), f"handle {handle}: offset {offset} after {len(tokens)} tokens"
            tokens.extend(token_ids)
        for sample in step.finished_samples:
            assert (sample.handle, sample.index) not in self.sample_reasons
            self.sample_reasons[sample.handle, sample.index] = sample.reason
        for finish in step.finished:
            assert finish.handle not in self.finished, f"handle {finish.handle} finished twice"
            self.finished[finish.handle] = finish
        self.logprobs.extend(step.logprobs)
        self.prompt_logprobs.extend(step.prompt_logprobs)
        if step.HasField("load"):
            self.load = step.load


@asynccontextmanager
async def open_link(
    method: Callable[[grpc.aio.Channel], Any], address: str, hello: link_pb2.Hello | None = None
) -> AsyncIterator[LinkPeer]:
    """Connect and shake hands. A refusal raises grpc.aio.AioRpcError or AssertionError."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = method(channel)()
        await call.write(link_pb2.ClientFrame(hello=hello or link_pb2.Hello(client_id="test", api_minor=1)))
        first = await call.read()
        if first is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )
        peer = LinkPeer(call, first.welcome)
        try:
            yield peer
        finally:
            call.cancel()
            await asyncio.gather(peer._reader, return_exceptions=True)
