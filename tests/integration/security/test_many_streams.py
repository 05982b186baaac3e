"""A thousand streams that wait and 256 that run, on one tokenizer process: what each costs in memory."""

from __future__ import annotations

import asyncio

import grpc
import psutil
import pytest

from line import start_line
from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from service_processes import Spawn

IDLE, ACTIVE, CHANNELS = 1000, 256, 4
FAKE = ("--engine", "fake", "--fake-preset", "h200-llama-8b", "--max-model-len", "4096", "--num-blocks", "65536")


@pytest.mark.slow
async def test_a_thousand_idle_and_256_active_streams(spawn: Spawn, redis, model_dir) -> None:
    line = start_line(
        spawn,
        redis,
        model_dir("smollm2-135m-instruct"),
        executors=((*FAKE, "--max-num-seqs", str(ACTIVE)),),
        tokenizer=("--workers", "1"),
    )
    worker = next(
        child for child in line.tokenizer.children() if "scalellm.services.tokenizer.worker" in child.cmdline()
    )
    request = generation_pb2.GenerateRequest(
        prompt="Once upon a time", sampling=common_pb2.SamplingParams(max_tokens=4000, ignore_eos=True)
    )
    channels = [
        grpc.aio.insecure_channel(line.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CHANNELS)
    ]
    stubs = [generation_pb2_grpc.GenerationStub(channel) for channel in channels]
    started: set[int] = set()
    flowing: set[int] = set()

    async def follow(number: int) -> None:
        async for response in stubs[number % CHANNELS].Generate(request):
            (flowing if response.HasField("delta") else started).add(number)

    before = worker.memory_info().rss
    streams: list[asyncio.Task[None]] = []
    try:
        async with asyncio.timeout(120):
            for number in range(ACTIVE + IDLE):
                streams.append(asyncio.create_task(follow(number)))
                while len(started) < len(streams) - 64:
                    await asyncio.sleep(0.01)
            while len(started) < ACTIVE + IDLE or len(flowing) < ACTIVE:
                await asyncio.sleep(0.1)
                for stream in streams:
                    assert not stream.done(), stream.exception()
        used = worker.memory_info().rss - before
        state = await line.scheduler_state()
        assert state.queued + state.running == ACTIVE + IDLE
        print(f"{ACTIVE} active and {IDLE} idle streams: {used / (ACTIVE + IDLE) / 1024:.1f} KiB per stream")
        assert used / (ACTIVE + IDLE) < 512 * 1024
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        for channel in channels:
            await channel.close()
    async with asyncio.timeout(60):
        while (state := await line.scheduler_state()).queued + state.running:
            await asyncio.sleep(0.1)
    assert state.accepted == state.finished + state.cancelled + state.rejected == ACTIVE + IDLE
    assert psutil.pid_exists(worker.pid)
