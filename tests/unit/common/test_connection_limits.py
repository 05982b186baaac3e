"""What a peer may do with connections: how many, how many calls on each, how much metadata, how often it may ping."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service_processes import PATIENCE
from services.common.lifecycle import MAX_METADATA_BYTES, GrpcService
from services.common.settings import ServiceSettings

HEALTH = health_pb2.HealthCheckRequest()
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


async def test_who_pings_all_the_time_is_cut_off():
    async with serving() as address:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        received = b""
        async with asyncio.timeout(PATIENCE):
            while b"too_many_pings" not in received:
                try:
                    writer.write(bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + b"12345678")
                    await writer.drain()
                    received += await reader.read(4096)
                except ConnectionError:
                    break
        writer.close()
        assert b"too_many_pings" in received
