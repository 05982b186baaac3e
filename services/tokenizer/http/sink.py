"""Sinks of a request's events: a stream of server-sent events, or one JSON document at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from aiohttp import web

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.generation.caller import Caller
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.generation.request_path import Call, Generation, Resumption
from scalellm.services.tokenizer.http.answer_format import Format
from scalellm.services.tokenizer.http.api_request import renamed
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.deadline import Deadline
from scalellm.services.tokenizer.http.event_stream import EventStream
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.v1 import generation_pb2


class HttpCaller(Caller):
    """An HTTP request. Its task is cancelled when the client leaves, and by its deadline.

    Args:
        call: The request.
        deadline: The client's waiting time.
    """

    transport = "http"

    def __init__(self, call: HttpCall, deadline: Deadline) -> None:
        self._deadline = deadline
        self.method = call.path
        method, _, route = call.path.partition(" ")
        self.span_attributes = {"http.request.method": method, "http.route": route}
        self.metadata = call.metadata

    def time_remaining(self) -> float | None:
        """Seconds until the client waits no more."""
        return self._deadline.time_remaining()


OnFinished = Callable[[Sequence[generation_pb2.Finished]], Awaitable[None]]
"""Awaited when all generations have finished, before their answer ends."""


class Sink:
    """Writes one answer to the client.

    Args:
        call: The HTTP call.
        format: Format of the answer.
        on_finished: See OnFinished.
    """

    def __init__(self, call: HttpCall, format: Format, on_finished: OnFinished | None = None) -> None:
        self.call = call
        self.format = format
        self.on_finished = on_finished
        self.response: web.StreamResponse | None = None

    async def open(self) -> None:
        """Begin the answer, once all generations were accepted."""

    async def write(self, text: str) -> None:
        """Write a part of the answer, in its format."""

    async def close(self, text: str, timing: str) -> None:
        """Write the last part; timing: latency breakdown, as a value of Server-Timing."""


class StreamSink(Sink):
    """Sends each part at once, as server-sent events."""

    async def open(self) -> None:
        """Send the headers."""
        self.call.stream = EventStream(self.call.request)
        self.response = self.call.stream.response
        await self.call.stream.open()

    async def write(self, text: str) -> None:
        """Send a part."""
        assert self.call.stream is not None
        if text:
            await self.call.stream.write(text.encode())

    async def close(self, text: str, timing: str) -> None:
        """Send the last part."""
        assert self.call.stream is not None
        await self.call.stream.close(text.encode())


class DocumentSink(Sink):
    """Sends the text that the format returns at the end, as one document. Earlier parts are empty."""

    async def close(self, text: str, timing: str) -> None:
        """Send the document."""
        headers = {"server-timing": timing}
        response = web.Response(body=text.encode(), headers=headers, content_type="application/json")
        await response.prepare(self.call.request)
        await response.write_eof()
        self.response = response


async def serve(
    edge: Edge,
    call: HttpCall,
    requests: Sequence[generation_pb2.GenerateRequest],
    names: Sequence[Mapping[str, str]],
    format: Format,
    *,
    is_stream: bool,
    on_finished: OnFinished | None = None,
    seen: Sequence[Sequence[int]] | None = None,
    asked: bytes = b"",
) -> web.StreamResponse:
    """Run the generations side by side and write their answer. Raises StatusError.

    All of them count as running until the answer is written. The first that fails ends the others.

    Args:
        edge: The worker.
        call: The HTTP call.
        requests: One per prompt.
        names: For each, what the client calls our fields; see `renamed`.
        format: Format of the answer.
        is_stream: True if the client wants each part when it comes.
        on_finished: See OnFinished.
        seen: Number of tokens of each sample that the client has, per prompt, to resume kept answers. The format gets
            these tokens as well, in Deltas that end there.
        asked: See Head.
    """
    sink = (StreamSink if is_stream else DocumentSink)(call, format, on_finished)
    deadline = call.deadline(is_stream=is_stream)
    caller = HttpCaller(call, deadline)

    def begin(number: int) -> Call:
        request = requests[number]
        if seen is None:
            return Generation(edge, request, caller, asked)
        resume = generation_pb2.ResumeRequest(request_id=request.request_id, offsets=seen[number])
        if request.HasField("stream_interval"):
            resume.stream_interval = request.stream_interval
        return Resumption(edge, resume, caller, again=request)

    together = _Together(begin, sink, deadline, [request.sampling.n or 1 for request in requests])
    try:
        async with deadline:
            if len(requests) == 1:
                await together.run(0, names[0])
            else:
                await _gather(together, names)
    except ConnectionError:
        raise asyncio.CancelledError from None  # the client has gone; its task is about to be told
    assert sink.response is not None
    return sink.response


async def _gather(together: _Together, names: Sequence[Mapping[str, str]]) -> None:
    failure: StatusError | ConnectionError | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for number, names_of_one in enumerate(names):
                group.create_task(together.run(number, names_of_one))
    except* (StatusError, ConnectionError) as errors:
        failure = errors.exceptions[0]  # type: ignore[assignment]
    if failure is not None:
        raise failure


class _Together:
    """Generations that are answered together.

    Args:
        begin: Begins the generation with a number.
        sink: Receives the answer.
        deadline: The client's time limits.
        num_samples: Samples of each generation.
    """

    def __init__(
        self, begin: Callable[[int], Call], sink: Sink, deadline: Deadline, num_samples: Sequence[int]
    ) -> None:
        self._begin = begin
        self._sink = sink
        self._deadline = deadline
        self._started = 0
        self._is_open = asyncio.Event()
        self._num_samples = sum(num_samples)  # not checked against the limit until all were accepted
        self._ended: set[tuple[int, int]] = set()
        """Generation and sample of each end that was written."""
        self._finished: list[generation_pb2.Finished | None] = [None] * len(num_samples)
        self._is_written = asyncio.Event()

    async def run(self, number: int, names: Mapping[str, str]) -> None:
        """Run one generation, and wait until the answer to all of them was written. Raises StatusError."""
        sink, format, progress = self._sink, self._sink.format, self._deadline.progress
        generation = self._begin(number)
        try:
            async with generation:
                async for event in generation.events:
                    if type(event) is Delta:  # almost always
                        text = format.delta(number, event)
                        if event.finished is not None and len(self._ended) < self._num_samples - 1:
                            text += self._sample_end(number, event.finished)
                        await sink.write(text)
                        progress()
                    elif isinstance(event, generation_pb2.Started):
                        await self._open(format.start(number, event))
                    elif isinstance(event, generation_pb2.PromptLogprobs):
                        await sink.write(format.prompt_logprobs(number, event))
                    elif isinstance(event, generation_pb2.Finished):
                        self._finished[number] = event
                await self._end(generation)
        except StatusError as error:
            raise renamed(error, names) from None

    async def _open(self, text: str) -> None:
        """Begin the answer once all generations were accepted, so that a refusal before can be the HTTP status."""
        self._started += 1
        if self._started == len(self._finished):
            await self._sink.open()
            self._is_open.set()
        await self._is_open.wait()
        await self._sink.write(text)

    async def _end(self, generation: Call) -> None:
        done = [finished for finished in self._finished if finished is not None]
        if len(done) == len(self._finished):
            if self._sink.on_finished is not None:
                await self._sink.on_finished(done)
            # The last ends come with all that follows, in one write.
            ends = [self._sample_end(number, sample) for number, one in enumerate(done) for sample in one.samples]
            await self._sink.close("".join(ends) + self._sink.format.end(done), generation.server_timing)
            self._is_written.set()
        await self._is_written.wait()

    def _sample_end(self, number: int, sample: generation_pb2.SampleFinished) -> str:
        if (number, sample.index) in self._ended:
            return ""
        self._ended.add((number, sample.index))
        return self._sink.format.sample_end(number, sample)
