"""A ScaleLLM server that plays scripts, behind the real proto: what the load generator is tested against."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc

MODEL, VOCAB_SIZE = "scripted", 1000
BREAKDOWN = common_pb2.LatencyBreakdown(
    total_ns=1_000_000, tokenize_ns=100_000, queue_ns=300_000, prefill_ns=400_000, decode_ns=200_000, ttft_ns=800_000
)


@dataclass
class Play:
    """The script of one request.

    Attributes:
        delay: Seconds before each delta.
        barrier: Met before the first delta.
        hold_after: Deltas after which nothing comes any more.
        chunk: Tokens per delta.
        abort_after: Deltas after which the call ends with `code`.
        code: See abort_after; OK ends the stream without Finished.
        session: Outcome of the session; default: saved where there is one.
        forget: Answer as if the session had no turns.
    """

    delay: float = 0.0
    barrier: asyncio.Barrier | None = None
    hold_after: int | None = None
    chunk: int = 1
    abort_after: int | None = None
    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    session: generation_pb2.SessionOutcome = generation_pb2.SESSION_OUTCOME_SAVED
    forget: bool = False


class ScriptedGeneration(generation_pb2_grpc.GenerationServicer, tokenizer_pb2_grpc.TokenizerServicer):
    """Listens on a port of its own; `play` says what becomes of each request."""

    def __init__(self) -> None:
        self.play: Callable[[generation_pb2.GenerateRequest], Play] = lambda request: Play()
        self.requests: list[generation_pb2.GenerateRequest] = []
        self.deadlines: list[float | None] = []
        self.num_cut_short = 0
        self.sessions: dict[str, int] = {}
        self.running = self.most_running = 0

    async def start(self) -> str:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        generation_pb2_grpc.add_GenerationServicer_to_server(self, self._server)
        tokenizer_pb2_grpc.add_TokenizerServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(0)

    async def GetInfo(self, request, context):
        return tokenizer_pb2.GetInfoResponse(model=MODEL, vocab_size=VOCAB_SIZE, version="1")

    async def Generate(self, request, context):
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        is_over = False
        try:
            async for response in self._answer(request, context, self.play(request)):
                yield response
            is_over = True
        finally:
            self.running -= 1
            self.num_cut_short += not is_over

    async def _answer(self, request, context, play):
        turns = self.sessions.get(request.session_id, 0)
        yield generation_pb2.GenerateResponse(
            started=generation_pb2.Started(model=MODEL, session_turns=0 if play.forget else turns)
        )
        if play.barrier is not None:
            await play.barrier.wait()
        num_tokens = request.sampling.max_tokens
        for number, offset in enumerate(range(0, num_tokens, play.chunk)):
            await asyncio.sleep(play.delay)
            if play.hold_after == number:
                await asyncio.Event().wait()
            if play.abort_after == number:
                if play.code is not grpc.StatusCode.OK:
                    await context.abort(play.code, "scripted")
                return
            count = min(play.chunk, num_tokens - offset)
            delta = generation_pb2.Delta(text=" word" * count, offset=offset, num_tokens=count)
            yield generation_pb2.GenerateResponse(delta=delta)
        finished = generation_pb2.Finished(latency=BREAKDOWN)
        finished.usage.prompt_tokens = len(request.tokens.ids) or len(request.chat.messages[0].content.split())
        finished.usage.completion_tokens = num_tokens
        if request.session_id:
            self.sessions[request.session_id] = turns + 1
            finished.session = play.session
        yield generation_pb2.GenerateResponse(finished=finished)
