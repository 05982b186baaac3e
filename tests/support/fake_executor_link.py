"""A scripted executor on the real proto: deterministic tokens, credits, and any misbehaviour that a test asks for."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc

from scalellm.services.common.link import add_tokens
from scalellm.v1 import common_pb2, executor_pb2_grpc, link_pb2

VOCAB = 5003


def next_token(previous: int, position: int, index: int) -> int:
    """Next token of the scripted model: a function of the previous token, its position and the sample."""
    return (previous * 31 + position * 7 + index * 13 + 1) % VOCAB


def expected_tokens(prompt: list[int], count: int, index: int = 0) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens[-1], len(tokens), index))
    return tokens[len(prompt) :]


@dataclass
class _Running:
    """A request in the scripted executor."""

    submit: link_pb2.Submit
    samples: dict[int, list[int]]
    open: set[int]
    prefilled: bool = False
    is_taken_back: bool = False


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
        takes_grammars: bool = False,
    ) -> None:
        self.takes_grammars = takes_grammars
        self.instance_id = instance_id or f"instance-{id(self):x}"
        self.model, self.tokenizer_sha256, self.max_model_len = model, tokenizer_sha256, max_model_len
        self.credit_tokens, self.max_running, self.step_time = credit_tokens, max_running, step_time
        self.address = ""
        self.submits: list[link_pb2.Submit] = []
        self.aborts: list[link_pb2.Abort] = []
        self.credit_violations = 0
        self.links: list[_Link] = []
        self.draining = False
        self.gives_back = False
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
        """Die as by kill -9: every link breaks at once, the port answers no more."""
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
            grammars=self.takes_grammars,
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
        for handle in submit.in_place_of:
            link.running[handle].is_taken_back = True
        if link.submitted_tokens >= link.granted_tokens or link.submitted_requests >= link.granted_requests:
            self.credit_violations += 1
        link.submitted_tokens += submit.charged_tokens
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
        moved = self.gives_back or running.is_taken_back
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
        if moved and status is None:
            status = link_pb2.LinkStatus(code=grpc.StatusCode.UNAVAILABLE.value[0], message="given back")
        if status is None:
            if submit.sampling.HasField("prompt_logprobs") and not running.prefilled:
                values = common_pb2.TokenLogprobs(logprobs=[-float(token) for token in prompt])
                step.prompt_logprobs.add(handle=handle, offset=0, values=values)
            running.prefilled = True
            for index in sorted(running.open):
                tokens = running.samples[index]
                previous = tokens[-1] if tokens else prompt[-1]
                token = next_token(previous, len(prompt) + len(tokens), index)
                add_tokens(step, handle, index, len(tokens), [token])
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
            step.finished.add(handle=handle, status=status, usage=usage, timings=timings, moved=moved)
            del link.running[handle]

    @staticmethod
    def _end_sample(
        step: link_pb2.StepOutput, handle: int, running: _Running, index: int, reason: common_pb2.FinishReason
    ) -> None:
        step.finished_samples.add(handle=handle, index=index, reason=reason)
        running.open.discard(index)

    def _load(self, link: _Link) -> link_pb2.Load:
        waiting = sum(r.submit.charged_tokens for r in link.running.values() if not r.prefilled)
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
