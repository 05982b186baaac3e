"""The path of a request through the edge, with all around it replaced."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import AsyncMock, MagicMock

import grpc
import pytest
from aiohttp import ClientConnectionResetError

from scalellm.services.common.api_keys import Tenant
from scalellm.services.tokenizer.generation import request_path
from scalellm.services.tokenizer.generation.answer import Event
from scalellm.services.tokenizer.generation.caller import Caller
from scalellm.services.tokenizer.generation.request_path import Generation
from scalellm.services.tokenizer.kept.kept_request import KeptRequest
from scalellm.v1 import generation_pb2


class FakeCaller(Caller):
    transport, method, span_attributes, metadata = "http", "POST /", {}, ()

    def time_remaining(self) -> float | None:
        return None


def make_generation(request: generation_pb2.GenerateRequest) -> tuple[Generation, MagicMock]:
    edge = MagicMock(tracer=None)
    return Generation(edge, request, FakeCaller()), edge


async def test_a_request_sent_again_is_found_once_more_when_it_may_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """While quotas are asked nobody reads it, so that its follower ends."""
    request = generation_pb2.GenerateRequest(request_id="r", on_disconnect=generation_pb2.ON_DISCONNECT_KEEP)
    generation, edge = make_generation(request)
    ended, follower = MagicMock(), MagicMock()
    edge.kept.find_same = AsyncMock(return_value=ended)

    @asynccontextmanager
    async def reading(tenant: Tenant) -> AsyncIterator[None]:
        edge.kept.find_same.return_value = follower
        yield

    read = []

    async def follow(self: Generation, kept: KeptRequest, *how: object) -> AsyncGenerator[Event, None]:
        read.append(kept)
        yield generation_pb2.Finished()

    edge.quotas.reading = reading
    monkeypatch.setattr(Generation, "_follow", follow)
    monkeypatch.setattr(request_path, "tell_apart", MagicMock())
    async with generation:
        assert [event async for event in generation.events] == [generation_pb2.Finished()]
    assert read == [follower]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClientConnectionResetError("Cannot write to closing transport"), grpc.StatusCode.CANCELLED),
        (grpc.aio.UsageError("RPC already finished."), grpc.StatusCode.CANCELLED),
        (ValueError("a bug"), grpc.StatusCode.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_client_that_left_before_a_write_is_no_error_of_the_server(
    error: Exception, code: grpc.StatusCode
) -> None:
    generation, edge = make_generation(generation_pb2.GenerateRequest())
    with pytest.raises(type(error)):
        async with generation:
            raise error
    edge.metrics.count_end.assert_called_once_with("http", code)
    (end,) = edge.request_log.write.call_args.args
    assert end.error.code is code
