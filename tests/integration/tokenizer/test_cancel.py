"""Clients that leave, wait too little, or read too slowly."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc, link_pb2
from scripted_scheduler import Script, default_tokens
from service_processes import PATIENCE, eventually


def request(max_tokens=50, **fields):
    return generation_pb2.GenerateRequest(
        prompt="Hello", sampling=common_pb2.SamplingParams(max_tokens=max_tokens, seed=1), **fields
    )


async def check_nothing_is_left(scheduler, client) -> None:
    await eventually(lambda: scheduler.num_running == 0)
    # The service still works, on the same link.
    scheduler.play = lambda submit: Script()
    await client.generate(request(1))


@pytest.mark.parametrize("held_after", [0, 3])
async def test_cancel_reaches_the_scheduler(client, scheduler, held_after):
    scheduler.play = lambda submit: Script(hold_after=held_after)
    call = client.generation.Generate(request())
    await eventually(lambda: scheduler.num_running == 1)
    if held_after:
        seen = 0
        while seen < held_after:
            seen += (await call.read()).delta.num_tokens
    call.cancel()
    await eventually(lambda: len(scheduler.aborts) == 1)
    (abort,) = scheduler.aborts
    assert abort.handle == scheduler.submits[0].handle
    assert abort.reason == link_pb2.ABORT_REASON_CANCELLED
    assert not abort.HasField("index")
    await check_nothing_is_left(scheduler, client)


async def test_dropped_connection_cancels(client, scheduler, service, connect):
    scheduler.play = lambda submit: Script(hold_after=2)
    other = connect(service.address)
    call = other.generation.Generate(request())
    assert (await call.read()).HasField("started")
    await other.channel.close()
    await eventually(lambda: len(scheduler.aborts) == 1)
    await check_nothing_is_left(scheduler, client)


async def test_deadline_ends_the_request_everywhere(client, scheduler):
    scheduler.play = lambda submit: Script(hold_after=2)
    for timeout in (0.3, 3.0, 30.0):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.generate(request(), timeout=timeout)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if scheduler.submits:  # else it passed before the request came so far
            break
    await eventually(lambda: len(scheduler.aborts) == 1)
    assert 0 < scheduler.submits[0].time_remaining_ns < 1.1e9 * timeout + 1e8  # gRPC rounds a timeout up
    await check_nothing_is_left(scheduler, client)


async def test_deadline_found_by_the_executor(client, scheduler):
    status = link_pb2.LinkStatus(code=4, message="the deadline passed after 2 tokens")
    scheduler.play = lambda submit: Script(fail_after=2, status=status)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.generate(request(), timeout=PATIENCE)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.value.details() == "the deadline passed after 2 tokens"
    assert scheduler.aborts == []


async def test_many_cancelled_at_random_moments(client, scheduler):
    scheduler.play = lambda submit: Script(delay=0.002)

    async def one(number: int) -> str:
        call = client.generation.Generate(request(10))
        try:
            async with asyncio.timeout(0.001 * (number % 20)):
                async for _ in call:
                    pass
        except TimeoutError:
            return "cancelled"
        return "finished"

    outcomes = await asyncio.gather(*(one(number) for number in range(60)))
    assert "cancelled" in outcomes
    await check_nothing_is_left(scheduler, client)


async def test_slow_reader_gets_merged_deltas(service, client, scheduler, tokenizer):
    scheduler.play = lambda submit: Script(chunk=1)
    # So much and no more is on its way to a client that does not read: a window of gRPC's, which does not grow here.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    message = request(2000, output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS)
    message.sampling.logprobs = 20
    channel = grpc.aio.insecure_channel(service.address, options=options)
    call = generation_pb2_grpc.GenerationStub(channel).Generate(message)
    assert (await call.read()).HasField("started")
    await eventually(lambda: scheduler.num_running == 0)
    deltas = []
    while (event := await call.read()) is not grpc.aio.EOF:
        if event.HasField("delta"):
            deltas.append(event.delta)
    tokens = default_tokens(scheduler.submits[0], 0)
    assert [token for delta in deltas for token in delta.token_ids] == tokens
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(tokens)
    assert len(deltas) < 1000
    await channel.close()
