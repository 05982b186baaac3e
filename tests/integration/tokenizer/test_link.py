"""The link to the scheduler: lost, late, refused."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2

from scalellm.v1 import common_pb2, generation_pb2, link_pb2, tokenizer_pb2
from scripted_scheduler import Script
from service_processes import PATIENCE, eventually


def request(max_tokens=5):
    return generation_pb2.GenerateRequest(prompt="Hello", sampling=common_pb2.SamplingParams(max_tokens=max_tokens))


def detailed_request(number):
    """Two samples with token ids and log-probabilities of everything."""
    return generation_pb2.GenerateRequest(
        prompt=f"Hello {number}",
        sampling=common_pb2.SamplingParams(max_tokens=7, n=2, seed=number, logprobs=2, prompt_logprobs=1),
        output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS,
    )


async def test_requests_of_a_broken_link_go_on_over_the_next_one(client, scheduler):
    undisturbed = [await client.generate(detailed_request(number)) for number in range(3)]
    scheduler.reset()
    broken = False
    scheduler.play = lambda submit: Script(start_at_resumed=True) if broken else Script(hold_after=2)
    running = [asyncio.create_task(client.generate(detailed_request(number))) for number in range(3)]
    await eventually(lambda: scheduler.num_running == 3)
    broken = True
    scheduler.break_links()
    for before, after in zip(undisturbed, await asyncio.gather(*running), strict=True):
        for index in range(2):
            assert after.text(index) == before.text(index)
            assert after.token_ids(index) == before.token_ids(index)
            assert after.logprobs(index) == before.logprobs(index)
        assert after.prompt_logprobs() == before.prompt_logprobs()
        latency = after.finished.latency
        assert latency.failover_ns > 0
        parts = (latency.session_ns, latency.tokenize_ns, latency.admission_ns, latency.queue_ns, latency.prefill_ns)
        rest = (latency.decode_ns, latency.failover_ns, latency.detokenize_ns, latency.network_ns)
        assert sum(parts) + sum(rest) == latency.total_ns
    assert sorted(submit.attempt for submit in scheduler.submits) == [0, 0, 0, 1, 1, 1]


async def test_a_scheduler_that_gives_its_requests_back_gets_them_again_when_it_is_back(client, scheduler):
    before = await client.generate(detailed_request(1))
    scheduler.reset()
    gone = link_pb2.LinkStatus(code=grpc.StatusCode.UNAVAILABLE.value[0], message="the scheduler stopped")
    plays = iter((Script(fail_after=2, status=gone, moved=True), Script(start_at_resumed=True)))
    scheduler.play = lambda submit: next(plays)
    running = asyncio.create_task(client.generate(detailed_request(1)))
    await eventually_status(client, health_pb2.HealthCheckResponse.NOT_SERVING)  # it takes no requests
    scheduler.break_links()
    after = await running
    assert (after.text(), after.logprobs()) == (before.text(), before.logprobs())


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
    try:
        await eventually_status(client, health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError, match="the scheduler has no executor yet"):
            await client.generate(request())
    finally:
        scheduler.model = "scripted"
    await client.wait_serving()
    await client.generate(request())


async def test_other_tokenizer_is_refused(client, scheduler):
    assert len(scheduler.hellos[0].tokenizer_sha256) == 32
    scheduler.tokenizer_sha256 = b"something else"
    scheduler.break_links()
    try:
        await eventually_status(client, health_pb2.HealthCheckResponse.NOT_SERVING)
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
