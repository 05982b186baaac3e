"""The raw HTTP/2 client of the tests: calls work, and windows that are not granted hold answers back."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2
from hyperframe.frame import SettingsFrame

from raw_http2 import connect
from scalellm.services.common.lifecycle import GrpcService
from service_processes import PATIENCE

CHECK = "/grpc.health.v1.Health/Check"


@pytest.fixture
async def address():
    service = GrpcService("127.0.0.1", 0, services=[], is_ready=lambda: True)
    await service.start()
    yield service.address
    await service.stop(0)


async def test_a_call_is_answered(address):
    async with asyncio.timeout(PATIENCE), connect(address) as peer:
        answer = await peer.answer(await peer.call(CHECK, b""))
        assert answer.code is grpc.StatusCode.OK
        (message,) = answer.messages
        assert health_pb2.HealthCheckResponse.FromString(message).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_message_of_many_windows_arrives(address):
    async with asyncio.timeout(PATIENCE), connect(address) as peer:
        request = health_pb2.HealthCheckRequest(service="x" * 2**20)
        answer = await peer.answer(await peer.call(CHECK, request.SerializeToString()))
        assert answer.code is grpc.StatusCode.NOT_FOUND


async def test_window_0_holds_the_answer_back_until_it_is_granted(address):
    async with asyncio.timeout(PATIENCE), connect(address, {SettingsFrame.INITIAL_WINDOW_SIZE: 0}) as peer:
        stream = await peer.call(CHECK, b"")
        while not peer.answers[stream].headers:
            await asyncio.sleep(0.01)
        assert await peer.round_trip()
        assert not peer.answers[stream].data
        peer.grant(stream, 1024)
        answer = await peer.answer(stream)
        assert answer.code is grpc.StatusCode.OK
        assert len(answer.messages) == 1
