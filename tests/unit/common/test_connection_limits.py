"""Limits on a peer's connections: how many, how many calls on each, how much metadata, what pings cost."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hyperframe.frame import PingFrame, SettingsFrame

from raw_http2 import connect
from scalellm.services.common.lifecycle import MAX_METADATA_BYTES, GrpcService
from scalellm.services.common.settings import ServiceSettings
from service_processes import PATIENCE

HEALTH = health_pb2.HealthCheckRequest()
PING = PingFrame(0, b"12345678").serialize()
OWN = [("grpc.use_local_subchannel_pool", 1)]


@asynccontextmanager
async def serving(**settings):
    options = ServiceSettings(**settings).connection_options
    service = GrpcService("127.0.0.1", 0, services=[], is_ready=lambda: True, options=options)
    await service.start()
    try:
        yield service.address
    finally:
        await service.stop(0)


async def test_connections_beyond_the_limit_are_closed():
    async with serving(max_connections=2) as address:
        channels = [grpc.aio.insecure_channel(address, options=OWN) for _ in range(3)]
        codes = []
        for channel in channels:
            call = health_pb2_grpc.HealthStub(channel).Check(HEALTH, timeout=PATIENCE)
            codes.append(await call.code())
        assert codes == [grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE]
        for channel in channels:
            await channel.close()


async def test_calls_beyond_the_limit_of_a_connection_wait():
    async with serving(max_streams_per_connection=3) as address, grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(HEALTH) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        last = asyncio.create_task(stub.Watch(HEALTH).read())  # only now: gRPC starts calls in any order
        await asyncio.sleep(0.1)
        assert not last.done()
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)


def start_calls(channels):
    """Not of asyncio: they are on their way before the server's loop, which is the test's, turns again."""
    stubs = [health_pb2_grpc.HealthStub(channel) for channel in channels]
    calls = [stub.Check.future(HEALTH, timeout=PATIENCE) for stub in stubs for _ in range(700)]
    time.sleep(0.5)
    return calls


async def test_a_burst_is_served_however_long_the_event_loop_looks_away():
    """More calls than gRPC keeps waiting of itself, which is 1000 to 3000; it cuts the others off with CANCELLED."""
    async with serving() as address:
        channels = [grpc.insecure_channel(address, options=OWN) for _ in range(3)]
        try:
            calls = start_calls(channels)
            codes = await asyncio.to_thread(lambda: {call.code() for call in calls})
        finally:
            for channel in channels:
                channel.close()
        assert codes == {grpc.StatusCode.OK}


async def test_too_much_metadata_is_refused():
    async with serving() as address, grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        await check(HEALTH, metadata=(("x-long", "y" * (MAX_METADATA_BYTES // 2)),))
        with pytest.raises(grpc.aio.AioRpcError, match="metadata size exceeds hard limit"):
            await check(HEALTH, metadata=(("x-long", "y" * MAX_METADATA_BYTES),))
        await check(HEALTH)


async def test_a_flood_of_pings_is_answered():
    """gRPC's limit (`max_ping_strikes`) would end the connection, at a cost of the square of the pings read at once."""
    async with asyncio.timeout(PATIENCE), serving() as address, connect(address) as peer:
        peer.write(PING * 20_000)
        while peer.num_pongs < 20_000 and not peer.closed.is_set():
            await asyncio.sleep(0.01)
        answer = await peer.answer(await peer.call("/grpc.health.v1.Health/Check", b""))
        assert (answer.code, peer.goaway) == (grpc.StatusCode.OK, None)


@pytest.mark.parametrize("frame", [PING, SettingsFrame(settings={}).serialize()], ids=["pings", "settings"])
async def test_who_does_not_read_the_answers_to_a_flood_is_not_read(frame):
    """Answers that cannot be written would otherwise pile up."""
    async with serving() as address, connect(address, is_reading=False) as peer:
        for _ in range(1000):
            peer.write(frame * 10_000)
            try:
                async with asyncio.timeout(1):
                    assert await peer.drain()
            except TimeoutError:
                break
        else:
            raise AssertionError("all frames were taken")
        async with grpc.aio.insecure_channel(address, options=OWN) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(HEALTH, timeout=PATIENCE)
