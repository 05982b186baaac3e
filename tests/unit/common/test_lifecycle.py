"""The end of a service, as its clients see it."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scalellm.services.common.lifecycle import GrpcService
from service_processes import PATIENCE

OWN = [("grpc.use_local_subchannel_pool", 1)]


async def call_until_refused(channel: grpc.aio.Channel, codes: Counter[grpc.StatusCode]) -> None:
    code = grpc.StatusCode.OK
    while code is grpc.StatusCode.OK:
        code = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).code()
        codes[code] += 1


async def test_whoever_calls_while_a_service_ends_is_told_that_it_is_unavailable():
    service = GrpcService("127.0.0.1", 0, services=[], is_ready=lambda: True)
    await service.start()
    codes: Counter[grpc.StatusCode] = Counter()

    async def watch(channel: grpc.aio.Channel) -> None:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        codes[await call.code()] += 1

    channels = [grpc.aio.insecure_channel(service.address, options=OWN) for _ in range(2)]
    calling = [asyncio.create_task(call_until_refused(channel, codes)) for channel in channels for _ in range(8)]
    calling += [asyncio.create_task(watch(channel)) for channel in channels]
    try:
        async with asyncio.timeout(PATIENCE):
            while codes[grpc.StatusCode.OK] < 100:
                await asyncio.sleep(0.01)
            await service.stop(0.1)
            await asyncio.gather(*calling)
    finally:
        for channel in channels:
            await channel.close()
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, codes


async def test_whoever_connects_after_all_others_were_cut_off_is_told_the_same(monkeypatch):
    """Unless the listener is shut first: gRPC cancels these calls without saying why."""
    service = GrpcService("127.0.0.1", 0, services=[], is_ready=lambda: True)
    await service.start()
    codes: Counter[grpc.StatusCode] = Counter()
    calling: list[asyncio.Task[None]] = []
    stop_grpc = service.server.stop
    async with grpc.aio.insecure_channel(service.address, options=OWN) as late:

        async def stop(grace: float | None) -> None:
            calling.extend(asyncio.create_task(call_until_refused(late, codes)) for _ in range(16))
            await asyncio.sleep(0.1)
            await stop_grpc(grace)

        monkeypatch.setattr(service.server, "stop", stop)
        await service.stop(0)
        await asyncio.wait_for(asyncio.gather(*calling), PATIENCE)
    assert codes == {grpc.StatusCode.UNAVAILABLE: 16}
