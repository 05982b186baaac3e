"""The neighbours' own wire against gRPC itself, and the messages they put together against protobuf."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import grpc
import pytest

from bench.services.neighbours.h2 import Stream, connect, listen
from bench.services.neighbours.wire import CompletionRequests, GenerateRequests, SubmitFrames, age, stamp_now
from scalellm.v1 import generation_pb2, link_pb2
from service_processes import PATIENCE

METHOD = "/test.Echo/Stream"


async def _echo(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message


@pytest.mark.parametrize("size", [0, 1, 20_000, 3_000_000])
async def test_client_against_grpc(size: int) -> None:
    """Sizes above a frame, above the initial window, and above what one read returns."""
    server = grpc.aio.server()
    handlers = {"Stream": grpc.stream_stream_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    connection = await connect(f"127.0.0.1:{port}")
    stream, got, ended = connection.call(METHOD), asyncio.Queue[bytes](), asyncio.Event()
    stream.on_message, stream.on_end = got.put_nowait, ended.set
    message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with asyncio.timeout(PATIENCE):
        for _ in range(3):
            stream.send(message)
            assert await got.get() == message
        await server.stop(0)
        await ended.wait()


@pytest.mark.parametrize("size", [0, 1, 20_000, 3_000_000])
async def test_server_against_grpc(size: int) -> None:
    def on_call(stream: Stream) -> None:
        stream.on_message = stream.send

    message = bytes(size)
    async with grpc.aio.insecure_channel(await listen(on_call), options=[("grpc.max_receive_message_length", -1)]) as c:
        calls = [c.stream_stream(METHOD)() for _ in range(2)]
        async with asyncio.timeout(PATIENCE):
            for _ in range(3):
                for call in calls:
                    await call.write(message)
                    assert await call.read() == message
        for call in calls:
            call.cancel()


def test_submit_frames() -> None:
    frames = [
        link_pb2.ClientFrame.FromString(SubmitFrames(100).make(handle, number, 8, "s")).submit
        for handle, number in ((7, 1), (8, 50_000))
    ]
    assert [frame.handle for frame in frames] == [7, 8]
    assert [len(frame.token_ids) for frame in frames] == [100, 100]
    assert frames[0].token_ids[:2] != frames[1].token_ids[:2]
    assert frames[0].sampling.max_tokens == 8
    assert frames[0].sampling.ignore_eos
    assert frames[0].session_id == "s"
    assert frames[0].request_id


def test_generate_requests() -> None:
    request = generation_pb2.GenerateRequest.FromString(GenerateRequests(100, text=False).make(3, 8, stamps=True))
    assert len(request.tokens.ids) == 100
    assert request.sampling.max_tokens == 8
    assert request.output == generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS
    text = generation_pb2.GenerateRequest.FromString(GenerateRequests(100, text=True).make(3, 8, stamps=False))
    assert len(text.prompt.split()) == 100
    assert text.output == generation_pb2.OUTPUT_TEXT


def test_completion_requests() -> None:
    head, _, body = CompletionRequests(100, text=False).make(3, 8, stamps=True).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    request = json.loads(body)
    grpc_request = generation_pb2.GenerateRequest.FromString(GenerateRequests(100, text=False).make(3, 8, stamps=True))
    assert request["prompt"] == list(grpc_request.tokens.ids)
    assert (request["max_tokens"], request["return_token_ids"]) == (8, True)
    text = json.loads(CompletionRequests(100, text=True).make(3, 8, stamps=False).partition(b"\r\n\r\n")[2])
    assert len(text["prompt"].split()) == 100


async def test_stamps_tell_their_age() -> None:
    stamp = stamp_now()
    assert 1_000 <= stamp < 41_000
    await asyncio.sleep(0.01)
    assert 0.0099 < age(stamp) < 30
