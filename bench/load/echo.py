"""Servers that answer at once and compute nothing: what the generator's own ceiling is measured against.

`python -m bench.load.echo grpc|openai INTERVAL_S` prints the port, and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import grpc
import uvloop

from bench.load.http_server import Reply, port_of, serve_http
from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc

MODEL = "echo"
VOCAB_SIZE = 32000


class EchoGrpc(generation_pb2_grpc.GenerationServicer, tokenizer_pb2_grpc.TokenizerServicer):
    """ScaleLLM's API: one delta per token and `interval_s` seconds."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s

    async def GetInfo(
        self, request: tokenizer_pb2.GetInfoRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.GetInfoResponse:
        """Name and size."""
        return tokenizer_pb2.GetInfoResponse(model=MODEL, vocab_size=VOCAB_SIZE)

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Send as many tokens as asked for."""
        yield generation_pb2.GenerateResponse(started=generation_pb2.Started(model=MODEL))
        for offset in range(request.sampling.max_tokens):
            await asyncio.sleep(self._interval_s)
            delta = generation_pb2.Delta(text=" word", offset=offset, num_tokens=1)
            yield generation_pb2.GenerateResponse(delta=delta)
        usage = common_pb2.Usage(prompt_tokens=len(request.tokens.ids), completion_tokens=request.sampling.max_tokens)
        yield generation_pb2.GenerateResponse(finished=generation_pb2.Finished(usage=usage))


class EchoOpenAi:
    """OpenAI's completions: one event per token and `interval_s` seconds."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s

    def __call__(self, path: str, body: bytes) -> Reply:
        """The handler for `serve_http`."""
        if path.endswith("/models"):
            return Reply(self._models())
        return Reply(self._events(json.loads(body)), "text/event-stream")

    async def _models(self) -> AsyncIterator[bytes]:
        yield json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode()

    async def _events(self, request: dict[str, int]) -> AsyncIterator[bytes]:
        chunk = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": MODEL}
        for _ in range(request["max_tokens"]):
            await asyncio.sleep(self._interval_s)
            choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
            yield _event({**chunk, "choices": [choice]})
        usage = {"prompt_tokens": 0, "completion_tokens": request["max_tokens"]}
        yield _event({**chunk, "choices": [], "usage": usage}) + b"data: [DONE]\n\n"


async def serve(protocol: str, interval_s: float) -> None:
    """Print the port, serve until standard input ends."""
    if protocol == "grpc":
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        servicer = EchoGrpc(interval_s)
        generation_pb2_grpc.add_GenerationServicer_to_server(servicer, server)
        tokenizer_pb2_grpc.add_TokenizerServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
    else:
        port = port_of(await serve_http(EchoOpenAi(interval_s)))
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


def _event(chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], float(sys.argv[2])))
