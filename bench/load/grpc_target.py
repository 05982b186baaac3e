"""ScaleLLM's public gRPC API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from itertools import cycle

import grpc

from bench.load.records import Ended, Request, RequestError, Tokens
from bench.load.target import TargetInfo
from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc

_OPTIONS = (
    # A pool of its own: channels to the same address would share one connection otherwise.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
# What a message is held back for at most: the API's own limit. Answers that nobody watches come in as few as possible.
_WHOLE_ANSWER = 1024
_INFO_TIMEOUT = 10.0


class GrpcTarget:
    """Sends prompts as token ids or as text, sessions as chat messages.

    Args:
        address: host:port.
        connections: Streams are spread over this many. Behind a port that several server processes share, each
            connection meets one of them.
        respect_eos: Let answers end where the model ends them, instead of at the planned length.
        as_text: Send text, which the server encodes, where ids would do.
        json_schema: JSON Schema of the answers.
    """

    def __init__(
        self,
        address: str,
        *,
        connections: int = 1,
        respect_eos: bool = False,
        as_text: bool = False,
        json_schema: str | None = None,
    ) -> None:
        self.takes_token_ids = not as_text
        self._channels = [grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in range(connections)]
        stubs = [generation_pb2_grpc.GenerationStub(channel) for channel in self._channels]
        self._stubs = cycle(stubs)
        self._ignore_eos = not respect_eos
        self._json_schema = json_schema

    async def info(self) -> TargetInfo:
        """Ask the tokenizer service."""
        stub = tokenizer_pb2_grpc.TokenizerStub(self._channels[0])
        try:
            answer = await stub.GetInfo(tokenizer_pb2.GetInfoRequest(), timeout=_INFO_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from None
        return TargetInfo(answer.model, answer.version, answer.vocab_size)

    async def connect(self, num_streams: int) -> None:
        """See Target."""
        ready = asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        with suppress(TimeoutError):
            await asyncio.wait_for(ready, _INFO_TIMEOUT)

    async def stream(self, request: Request) -> AsyncGenerator[Tokens | Ended]:
        """See Target."""
        call = next(self._stubs).Generate(self._message(request), timeout=request.deadline_s)
        ended: Ended | None = None
        try:
            async for response in call:
                event = response.WhichOneof("event")
                if event == "delta":
                    if response.delta.num_tokens:
                        yield Tokens(response.delta.num_tokens, response.delta.text)
                elif event == "started":
                    _check_history(request, response.started)
                elif event == "finished":
                    ended = _account(request, response.finished)
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from None
        finally:
            call.cancel()
        if ended is None:
            raise RequestError("dropped", "the stream ended without Finished")
        yield ended

    async def close(self) -> None:
        """Close all connections."""
        for channel in self._channels:
            await channel.close()

    def _message(self, request: Request) -> generation_pb2.GenerateRequest:
        message = generation_pb2.GenerateRequest(
            sampling=common_pb2.SamplingParams(
                max_tokens=request.output_len, temperature=0, ignore_eos=self._ignore_eos
            ),
            stream_interval=1 if request.stream else _WHOLE_ANSWER,
            session_id=request.session_id,
        )
        if self._json_schema is not None:
            message.structured_output.json_schema = self._json_schema
        if request.session_id is not None:
            message.chat.messages.add(role="user", content=request.text)
        elif self.takes_token_ids:
            message.tokens.ids.extend(request.token_ids)
        else:
            message.prompt = request.text
        return message


def _check_history(request: Request, started: generation_pb2.Started) -> None:
    turns = len(request.history) // 2
    if request.session_id is not None and started.session_turns != turns:
        raise RequestError("session_lost", f"the session has {started.session_turns} turns instead of {turns}")


def _account(request: Request, finished: generation_pb2.Finished) -> Ended:
    if request.session_id is not None and finished.session != generation_pb2.SESSION_OUTCOME_SAVED:
        raise RequestError("session_not_saved", generation_pb2.SessionOutcome.Name(finished.session))
    breakdown = {
        field.name.removesuffix("_ns"): int(value)
        for field, value in finished.latency.ListFields()
        if field.name.endswith("_ns")
    }
    usage = finished.usage
    return Ended(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, breakdown or None)


def _failure(error: grpc.aio.AioRpcError) -> RequestError:
    code = error.code()
    kind = "deadline" if code is grpc.StatusCode.DEADLINE_EXCEEDED else code.name
    return RequestError(kind, error.details() or kind)
