"""A service that is told to end: what runs is finished, what comes is told to come again elsewhere."""

from __future__ import annotations

import asyncio
import json

import aiohttp

from scripted_scheduler import Script
from service_processes import PATIENCE, eventually

BODY = {"prompt": "Hello", "max_tokens": 5, "seed": 1, "stream": True}


async def test_streams_are_finished_and_new_requests_refused(scheduler, spawn, model_dir):
    model = str(model_dir("smollm2-135m-instruct"))
    service = spawn("tokenizer", "--scheduler", scheduler.address, "--model", model, "--workers", "1")
    go = asyncio.Event()
    scheduler.play = lambda submit: Script(go=go)
    base = f"http://{service.http_address}"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session:

        async def health() -> int:
            async with session.get(f"{base}/health") as response:
                return response.status

        while await health() != 200:
            await asyncio.sleep(0.05)
        # Begun, and connected, before the end: the port may be closed by then for who is not.
        running = await session.post(f"{base}/v1/completions", json=BODY)
        idle = aiohttp.ClientSession()
        async with idle.get(f"{base}/health") as response:
            assert response.status == 200
        await eventually(lambda: scheduler.num_running == 1)
        service.process.terminate()
        while await health() == 200:
            await asyncio.sleep(0.05)
        async with idle.post(f"{base}/v1/completions", json=BODY) as response:
            assert response.status == 503
            assert response.headers["connection"] == "close"
            assert response.headers["retry-after"] == "1"
            assert (await response.json())["error"]["code"] == "unavailable"
        await idle.close()
        go.set()
        lines = (await running.read()).decode().split("\n\n")
    assert lines[-2] == "data: [DONE]"
    assert json.loads(lines[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert await asyncio.to_thread(service.process.wait, PATIENCE) == 0
