"""A scheduler that plays scripts, behind the real proto: what the text edge is tested against."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc

from scalellm.services.common.link import ServerLink, add_tokens
from scalellm.v1 import common_pb2, link_pb2, scheduler_pb2_grpc

MAX_MODEL_LEN = 2048
EXECUTOR = "executor-1:50061"


def default_tokens(submit: link_pb2.Submit, index: int) -> list[int]:
    """Ordinary tokens that depend on prompt, seed and sample only."""
    state = sum(submit.token_ids) + 31 * submit.sampling.seed + 7 * index
    return [1000 + (state + 7919 * step) % 40000 for step in range(submit.sampling.max_tokens)]


@dataclass
class Script:
    """The script of one request.

    Attributes:
        samples: Tokens per sample; default: `default_tokens`.
        chunk: Tokens of a sample per step.
        delay: Seconds before each step.
        hold_after: Steps after which nothing comes until `go` is set, or without one until the request is aborted.
        refuse: Answer with this status at once.
        full: Seconds for which that is said to hold for all requests of the tenant.
        fail_after: Steps after which the request ends with `status`.
        status: See fail_after.
        moved: The request is given back with that status.
        start_at_resumed: Go on after the tokens that the Submit brings, instead of sending them again.
        reason: Finish reason of the samples.
        stop_token: Reported with the end: the last token is a stop token.
        skip_offset: Leave out the token at this offset: a fault.
        repeat: Send every chunk again with the next one, as a replay would.
        cached_tokens: For the usage.
        merged: Steps that leave as one frame.
        go: Waited for after `hold_after` steps, or before the first step if `hold_after` is None.
    """

    samples: list[list[int]] | None = None
    chunk: int = 1
    delay: float = 0.0
    hold_after: int | None = None
    refuse: link_pb2.LinkStatus | None = None
    full: float = 0.0
    fail_after: int | None = None
    status: link_pb2.LinkStatus | None = None
    moved: bool = False
    start_at_resumed: bool = False
    reason: common_pb2.FinishReason = common_pb2.FINISH_REASON_LENGTH
    stop_token: bool = False
    skip_offset: int | None = None
    repeat: bool = False
    cached_tokens: int = 0
    merged: int = 1
    go: asyncio.Event | None = None


@dataclass
class ScriptedLink:
    """One connected worker."""

    client_id: str
    server_link: ServerLink = field(default_factory=ServerLink)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    handles: set[int] = field(default_factory=set)
    """Handles of the requests that came since the last reset."""
    stopped: set[tuple[int, int]] = field(default_factory=set)
    broken: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedScheduler(scheduler_pb2_grpc.SchedulerServicer):
    """Listens on a port of its own; `play` says what becomes of each request."""

    def __init__(self) -> None:
        self.play: Callable[[link_pb2.Submit], Script] = lambda submit: Script()
        self.submits: list[link_pb2.Submit] = []
        self.submitted_on: list[str] = []
        self.aborts: list[link_pb2.Abort] = []
        self.hellos: list[link_pb2.Hello] = []
        self.links: list[ScriptedLink] = []
        self.tokenizer_sha256 = b""
        self.model = "scripted"
        self.vocab_size = 49152
        self.takes_grammars = True
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def num_running(self) -> int:
        return sum(len(link.tasks) for link in self.links)

    async def start(self) -> ScriptedScheduler:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0)))
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()
        return self

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def reset(self) -> None:
        """Forget all scripts and requests, also those whose aborts come later; what runs is cancelled."""
        self.play = lambda submit: Script()
        self.submits.clear()
        self.submitted_on.clear()
        self.aborts.clear()
        for link in self.links:
            link.handles.clear()
            for task in link.tasks.values():
                task.cancel()

    def break_links(self) -> None:
        for link in self.links:
            link.broken.set()

    async def Connect(self, frames: AsyncIterator[link_pb2.ClientFrame], context: grpc.aio.ServicerContext) -> None:
        hello = (await anext(frames)).hello
        self.hellos.append(hello)
        if self.tokenizer_sha256 and hello.tokenizer_sha256 != self.tokenizer_sha256:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "tokenizer_sha256: another tokenizer")
        link = ScriptedLink(hello.client_id)
        self.links.append(link)
        welcome = link_pb2.Welcome(
            instance_id="scripted",
            api_minor=1,
            model=self.model,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=self.vocab_size,
            block_size=16,
            num_blocks=1000,
            max_num_seqs=64,
            grammars=self.takes_grammars,
        )
        serving = asyncio.create_task(
            link.server_link.run(
                link_pb2.ServerFrame(welcome=welcome).SerializeToString(),
                (frame.SerializeToString() async for frame in frames),
                _Writer(context),
                lambda frame: self._on_frame(link, link_pb2.ClientFrame.FromString(frame)),
            )
        )
        breaking = asyncio.create_task(link.broken.wait())
        try:
            await asyncio.wait((serving, breaking), return_when=asyncio.FIRST_COMPLETED)
            if breaking.done():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted break")
        finally:
            self.links.remove(link)
            for task in (serving, breaking, *link.tasks.values()):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(serving, breaking, *link.tasks.values(), return_exceptions=True)

    def _on_frame(self, link: ScriptedLink, frame: link_pb2.ClientFrame) -> None:
        if frame.HasField("abort"):
            abort = frame.abort
            if abort.handle in link.handles:
                self.aborts.append(abort)
            task = link.tasks.get(abort.handle)
            if abort.HasField("index"):
                link.stopped.add((abort.handle, abort.index))
            elif task is not None:
                task.cancel()
            return
        link.handles.add(frame.submit.handle)
        self.submits.append(frame.submit)
        self.submitted_on.append(link.client_id)
        task = asyncio.create_task(self._run(link, frame.submit))
        link.tasks[frame.submit.handle] = task
        task.add_done_callback(lambda _: link.tasks.pop(frame.submit.handle, None))

    async def _run(self, link: ScriptedLink, submit: link_pb2.Submit) -> None:
        script = self.play(submit)
        handle, sampling = submit.handle, submit.sampling
        usage = common_pb2.Usage(prompt_tokens=len(submit.token_ids), cached_tokens=script.cached_tokens)
        frames: list[bytes] = []

        def send(**parts: object) -> None:
            step = link_pb2.StepOutput(**parts)  # type: ignore[arg-type]
            frames.append(link_pb2.ServerFrame(step=step).SerializeToString())
            if len(frames) >= script.merged or step.finished:
                link.server_link.send(b"".join(frames))
                frames.clear()

        def finish(status: link_pb2.LinkStatus | None = None) -> None:
            timings = link_pb2.HopTimings(
                executor_total_ns=4000, queue_ns=1000, prefill_ns=2000, decode_ns=1000, executor_id=EXECUTOR,
                scheduler_total_ns=5000, admission_ns=500,
            )  # fmt: skip
            moved = status is not None and script.moved
            end = link_pb2.Finish(handle=handle, status=status, usage=usage, timings=timings, moved=moved)
            end.tenant_full_ns = int(script.full * 1e9)
            send(finished=[end])

        try:
            if script.refuse is not None:
                finish(script.refuse)
                return
            if sampling.HasField("prompt_logprobs"):
                half = len(submit.token_ids) // 2
                for start, end in ((0, half), (half, len(submit.token_ids))):
                    send(prompt_logprobs=[_logprobs(handle, 0, start, end - start, sampling.prompt_logprobs)])
            go = script.go or asyncio.Event()
            hold_after = 0 if script.hold_after is None and script.go is not None else script.hold_after
            samples = script.samples or [default_tokens(submit, index) for index in range(sampling.n)]
            done = [0] * len(samples)
            ended = [False] * len(samples)
            if script.start_at_resumed:
                for sample in submit.resumed:
                    done[sample.index] = len(sample.token_ids)
                    ended[sample.index] = bool(sample.finished)
            num_steps = 0
            while not all(ended):
                if hold_after is not None and num_steps >= hold_after:
                    await go.wait()
                if script.fail_after is not None and num_steps >= script.fail_after:
                    finish(script.status)
                    return
                await asyncio.sleep(script.delay)
                num_steps += 1
                step = link_pb2.StepOutput()
                for index, tokens in enumerate(samples):
                    if ended[index]:
                        continue
                    start, end = done[index], min(done[index] + script.chunk, len(tokens))
                    first = max(0, start - script.chunk) if script.repeat else start
                    if script.skip_offset is not None and start <= script.skip_offset < end:
                        first = script.skip_offset + 1
                    add_tokens(step, handle, index, first, tokens[first:end])
                    if sampling.HasField("logprobs"):
                        step.logprobs.append(_logprobs(handle, index, first, end - first, sampling.logprobs))
                    usage.completion_tokens += end - start
                    done[index] = end
                    was_stopped = (handle, index) in link.stopped
                    if end == len(tokens) or was_stopped:
                        ended[index] = True
                        step.finished_samples.add(
                            handle=handle,
                            index=index,
                            reason=common_pb2.FINISH_REASON_STOP if was_stopped else script.reason,
                            stop_token_id=tokens[-1] if script.stop_token and end == len(tokens) else None,
                        )
                frame = link_pb2.ServerFrame(step=step).SerializeToString()
                frames.append(frame)
                if len(frames) >= script.merged:
                    link.server_link.send(b"".join(frames))
                    frames.clear()
            finish()
        except asyncio.CancelledError:
            finish(link_pb2.LinkStatus(code=1, message="cancelled"))
            raise


def _logprobs(handle: int, index: int, offset: int, count: int, num_top: int) -> link_pb2.LinkLogprobs:
    """Values that name their place: token i has -i/4, its k-th alternative is k with -k."""
    return link_pb2.LinkLogprobs(
        handle=handle,
        index=index,
        offset=offset,
        values=common_pb2.TokenLogprobs(
            logprobs=[-(offset + i) / 4 for i in range(count)],
            num_top=num_top,
            top_token_ids=[k for _ in range(count) for k in range(num_top)],
            top_logprobs=[-float(k) for _ in range(count) for k in range(num_top)],
        ),
    )


class _Writer:
    """The generated servicer serialises messages; a link writes bytes."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def write(self, message: bytes) -> None:
        await self._context.write(link_pb2.ServerFrame.FromString(message))
