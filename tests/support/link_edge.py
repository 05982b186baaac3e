"""The raw client end of Scheduler.Connect: a tokenizer worker without a tokenizer."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from fake_executor_link import VOCAB, expected_tokens
from scalellm.services.common.link import token_runs
from scalellm.v1 import common_pb2, link_pb2, scheduler_pb2_grpc
from service_processes import PATIENCE


@dataclass
class Stream:
    """Answer that the raw link client received for one of its requests."""

    handle: int
    prompt: list[int]
    samples: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    prompt_logprobs: list[float] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)
    finish: link_pb2.Finish | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def code(self) -> int:
        assert self.finish is not None
        return self.finish.status.code

    def check_tokens(self, count: int, n: int = 1) -> None:
        assert self.code == 0, self.finish
        for index in range(n):
            assert self.samples[index] == expected_tokens(self.prompt, count, index)


class LinkEdge:
    """A client link without a tokenizer: checks that offsets have no gap, no repetition and nothing follows an end."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = scheduler_pb2_grpc.SchedulerStub(self._channel)
        self.streams: dict[int, Stream] = {}
        self.welcome = link_pb2.Welcome()
        self.draining = False
        self.frames = 0
        self._next = 0
        self._writing = asyncio.Lock()

    async def open(self, tokenizer_sha256: bytes = b"", model: str = "") -> "LinkEdge":
        self.call = self.stub.Connect()
        hello = link_pb2.Hello(client_id="edge", api_minor=1, tokenizer_sha256=tokenizer_sha256, model=model)
        await self.call.write(link_pb2.ClientFrame(hello=hello))
        frame = await self.call.read()
        if frame is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await self.call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await self.call.details()
            )
        self.welcome = frame.welcome
        self.reading = asyncio.create_task(self._read())
        return self

    async def close(self) -> None:
        if hasattr(self, "call"):
            self.call.cancel()
            if hasattr(self, "reading"):
                await asyncio.gather(self.reading, return_exceptions=True)
        await self._channel.close()

    async def submit(
        self,
        prompt: list[int] | int = 10,
        max_tokens: int = 8,
        *,
        time_remaining: float | None = None,
        priority: int = 0,
        session_id: str = "",
        cache_salt: bytes = b"",
        resumed: dict[int, list[int]] | None = None,
        finished: dict[int, common_pb2.FinishReason] | None = None,
        handle: int | None = None,
        attempt: int = 0,
        grammar: str = "",
        in_place_of: Sequence[int] = (),
        **sampling: int,
    ) -> Stream:
        handle = handle if handle is not None else self._next
        self._next = max(self._next, handle) + 1
        token_ids = [1 + (handle * 97 + i) % (VOCAB - 1) for i in range(prompt)] if isinstance(prompt, int) else prompt
        submit = link_pb2.Submit(
            handle=handle,
            request_id=f"r{handle}",
            token_ids=token_ids,
            sampling=common_pb2.SamplingParams(max_tokens=max_tokens, **sampling),
            priority=priority,
            session_id=session_id,
            cache_salt=cache_salt,
            attempt=attempt,
            in_place_of=in_place_of,
            grammar=grammar,
        )
        if time_remaining is not None:
            submit.time_remaining_ns = int(time_remaining * 1e9)
        stream = self.streams[handle] = Stream(handle, token_ids)
        for index, emitted in (resumed or {}).items():
            reason = (finished or {}).get(index, common_pb2.FINISH_REASON_UNSPECIFIED)
            submit.resumed.add(index=index, token_ids=emitted, finished=reason)
            stream.samples[index] = list(emitted)
        await self._write(link_pb2.ClientFrame(submit=submit))
        return stream

    async def abort(
        self, stream: Stream, reason: int = link_pb2.ABORT_REASON_CANCELLED, index: int | None = None
    ) -> None:
        abort = link_pb2.Abort(handle=stream.handle, reason=reason, index=index)
        await self._write(link_pb2.ClientFrame(abort=abort))

    async def _write(self, frame: link_pb2.ClientFrame) -> None:
        async with self._writing:  # gRPC takes one write at a time
            await self.call.write(frame)

    async def finish(self, *streams: Stream, limit: float = PATIENCE) -> None:
        async with asyncio.timeout(limit):
            for stream in streams:
                await stream.done.wait()

    async def _read(self) -> None:
        while (frame := await self.call.read()) is not grpc.aio.EOF:
            step = frame.step
            self.frames += 1
            if step.load.draining:
                self.draining = True
            assert sum(step.counts) == len(step.token_ids)
            for handle, index, offset, token_ids in token_runs(step):
                stream = self.streams[handle]
                tokens = stream.samples.setdefault(index, [])
                assert offset == len(tokens), "a token is missing or repeated"
                assert stream.finish is None
                assert index not in stream.ended
                tokens += token_ids
            for logprobs in step.logprobs:
                values = self.streams[logprobs.handle].logprobs.setdefault(logprobs.index, [])
                assert logprobs.offset == len(values)
                values += logprobs.values.logprobs
            for logprobs in step.prompt_logprobs:
                values = self.streams[logprobs.handle].prompt_logprobs
                assert logprobs.offset == len(values)
                values += logprobs.values.logprobs
            for sample in step.finished_samples:
                assert sample.index not in self.streams[sample.handle].ended
                self.streams[sample.handle].ended[sample.index] = sample.reason
            for finish in step.finished:
                stream = self.streams[finish.handle]
                assert stream.finish is None, "a request ended twice"
                stream.finish = finish
                stream.done.set()
