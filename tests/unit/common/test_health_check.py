"""A container's health check uses Python's standard library alone, and still asks grpc.health.v1."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from scalellm.services.common import health_check
from scalellm.services.common.health import LIVENESS
from scalellm.services.common.lifecycle import GrpcService
from service_processes import PATIENCE


async def run_check(address: str, *name: str) -> tuple[int | None, str]:
    """Run the check as the images do: -I and -S leave it neither packages nor the environment."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-IS", Path(health_check.__file__), address, *name), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    return process.returncode, out.decode()


async def test_it_says_what_the_service_says():
    ready = False
    service = GrpcService("127.0.0.1", 0, services=[], is_ready=lambda: ready)
    await service.start()
    address = service.address
    assert await run_check(address) == (1, f"{address}: not serving\n")
    assert await run_check(address, LIVENESS) == (0, f"{address}: serving\n")
    ready = True
    assert await run_check(address) == (0, f"{address}: serving\n")
    await service.stop(0)
    assert await run_check(address) == (1, f"{address}: unreachable\n")


async def test_who_takes_the_call_and_says_nothing_gives_no_answer():
    stuck = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    async with stuck:
        address = f"127.0.0.1:{stuck.sockets[0].getsockname()[1]}"
        assert await run_check(address) == (1, f"{address}: no answer\n")
