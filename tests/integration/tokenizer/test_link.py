"""The link to the scheduler: lost, late, refused."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2

from scalellm.v1 import common_pb2, generation_pb2, tokenizer_pb2
from scripted_scheduler import Script
from service_processes import PATIENCE, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")


def request(max_tokens=5):
    return generation_pb2.GenerateRequest(prompt="Hello", sampling=common_pb2.SamplingParams(max_tokens=max_tokens))


async def collect(call) -> list[generation_pb2.GenerateResponse]:
    return [event async for event in call]


async def test_broken_link_ends_running_requests(client, scheduler, error_details):
    scheduler.play = lambda submit: Script(hold_after=2)
    calls = [client.generation.Generate(request(50)) for _ in range(3)]
    await eventually(lambda: scheduler.num_running == 3)
    ends = [asyncio.create_task(collect(call)) for call in calls]
    scheduler.break_links()
    for end in ends:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await end
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the link to the scheduler broke" in error.value.details()
        assert "scripted break" in error.value.details()
        assert error_details(error.value)[1] == 1.0


async def test_new_requests_wait_for_the_link(client, scheduler):
    async with asyncio.timeout(PATIENCE):
        while True:
            scheduler.break_links()
            await eventually(lambda: not scheduler.links)
            sent = time.monotonic()
            answers = await asyncio.gather(*(client.generate(request()) for _ in range(5)), return_exceptions=True)
            if not any(isinstance(answer, grpc.aio.AioRpcError) for answer in answers):
                break
            assert time.monotonic() - sent > 1.5  # so long they do wait: the link was not back by then
            await client.wait_serving()
    assert all(answer.finished.usage.completion_tokens == 5 for answer in answers)


async def test_without_scheduler_requests_end_unavailable(client, scheduler, error_details):
    await scheduler.stop()
    try:
        await eventually_status(client, health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.generate(request())
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the scheduler cannot be reached" in error.value.details()
        assert error_details(error.value)[1] == 1.0
        # What needs no scheduler goes on.
        info = await client.tokenizer.GetInfo(tokenizer_pb2.GetInfoRequest())
        assert info.max_model_len == 0
        assert (await client.tokenizer.Encode(tokenizer_pb2.EncodeRequest(text="Hello"))).tokens == ["Hello"]
    finally:
        await scheduler.start()
    await client.wait_serving()
    await client.generate(request())


async def test_scheduler_without_executors_is_waited_for(client, scheduler):
    scheduler.model = ""
    scheduler.break_links()
    await eventually_status(client, health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(grpc.aio.AioRpcError, match="the scheduler has no executor yet"):
        await client.generate(request())
    scheduler.model = "scripted"
    await client.wait_serving()
    await client.generate(request())


async def test_other_tokenizer_is_refused(client, scheduler):
    assert len(scheduler.hellos[0].tokenizer_sha256) == 32
    scheduler.tokenizer_sha256 = b"something else"
    scheduler.break_links()
    await eventually_status(client, health_pb2.HealthCheckResponse.NOT_SERVING)
    try:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.generate(request())
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "tokenizer_sha256" in error.value.details()
    finally:
        scheduler.tokenizer_sha256 = b""
    await client.wait_serving()


async def eventually_status(client, status: int) -> None:
    async with asyncio.timeout(PATIENCE):
        async for answer in client.health.Watch(health_pb2.HealthCheckRequest()):
            if answer.status == status:
                return
