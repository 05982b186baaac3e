"""Requests that outlive their calls, and are cancelled: from anywhere, once, for everybody."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from kept_client import Client, request, serving
from scalellm.v1 import link_pb2
from scripted_scheduler import Script
from service_processes import eventually


async def test_a_cancelled_request_ends_once_for_everybody(client, scheduler, store):
    scheduler.play = lambda submit: Script(delay=0.002, hold_after=5)
    mine = Client(request(40))
    other = Client(mine.request)
    reading = [asyncio.create_task(reader.begin(client)) for reader in (mine, other)]
    await eventually(lambda: mine.offsets == other.offsets == [5])
    await mine.cancel(client)
    await mine.cancel(client)
    late = Client(mine.request)
    for attempt in (*reading, late.resume(client)):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await attempt
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.CANCELLED, "the request was cancelled")
    assert mine.tokens == other.tokens == late.tokens
    await eventually(lambda: scheduler.num_running == 0)
    assert [abort.reason for abort in scheduler.aborts] == [link_pb2.ABORT_REASON_CANCELLED]
    assert len(scheduler.submits) == 1
    unknown = Client(request(1))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await unknown.cancel(client)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_what_has_ended_cannot_be_cancelled_any_more(client, scheduler):
    mine = Client(request(5))
    await mine.begin(client)
    await mine.cancel(client)
    again = Client(mine.request)
    await again.resume(client)
    again.check(mine)


async def test_a_request_is_cancelled_where_it_runs_and_where_its_worker_is_gone(client, scheduler, start, connect):
    scheduler.play = lambda submit: Script(delay=0.002, hold_after=5, start_at_resumed=True)
    first, second = start(), start()
    one, two = await serving(connect, first), await serving(connect, second)
    running, orphan = Client(request(40)), Client(request(40))
    reading = [asyncio.create_task(reader.begin(one)) for reader in (running, orphan)]
    await eventually(lambda: running.offsets == orphan.offsets == [5])
    await running.cancel(two)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await reading[0]
    assert error.value.code() is grpc.StatusCode.CANCELLED
    await eventually(lambda: len(scheduler.aborts) == 1 and scheduler.num_running == 1)

    first.kill_tree()
    await asyncio.gather(*reading, return_exceptions=True)
    await eventually(lambda: scheduler.num_running == 0)
    await orphan.cancel(two)
    for mine in (running, orphan):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await mine.resume(two)
        assert error.value.code() is grpc.StatusCode.CANCELLED
    assert len(scheduler.submits) == 2, "what is to be cancelled is not begun again"
    for other in (one, two):
        await other.channel.close()
