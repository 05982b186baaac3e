"""The generator's limits on this machine, by protocol, when the server costs nothing.

The echo server is a process of its own, so that what is measured is the generator alone. It paces its tokens, as
servers do: messages that pile up would be read many at a time, for less than they cost when they come one by one.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.load.driver import Driver
from bench.load.grpc_target import GrpcTarget
from bench.load.openai_target import OpenAiTarget
from bench.load.run import Step, run_step
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Load, Shape

_ROOT = Path(__file__).resolve().parents[2]
_INTERVAL_S = 0.02
_STARTUP_S = 30.0


@asynccontextmanager
async def _echo(protocol: str) -> AsyncIterator[int]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.load.echo", protocol, str(_INTERVAL_S)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=_ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(await asyncio.wait_for(process.stdout.readline(), _STARTUP_S))
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _STARTUP_S)
        except TimeoutError:
            process.kill()


async def self_test(concurrency: int = 64, num_requests: int = 128, output_len: int = 64) -> dict[str, Step]:
    """One step against an echo server by protocol."""
    steps = {}
    for protocol in ("grpc", "openai"):
        async with _echo(protocol) as port:
            address = f"127.0.0.1:{port}"
            target = GrpcTarget(address) if protocol == "grpc" else OpenAiTarget(f"http://{address}/v1")
            try:
                await target.info()
                steps[protocol] = await run_step(
                    Driver(target, Vocabulary.of_size(1000)),
                    Shape(input_len=128, output_len=output_len),
                    Load(concurrency=concurrency),
                    alphabet=range(1000),
                    num_requests=num_requests,
                    seed="self-test",
                )
            finally:
                await target.close()
    return steps


def self_test_text(steps: dict[str, Step]) -> str:
    """Return the generator's limits as text, in messages per second."""
    lines = [f"{' Load generator against an echo server ':=^66}"]
    lines.append(f"{'':<10}{'messages/s of CPU':>20}{'CPU used':>12}{'loop lag p99 ms':>18}")
    for protocol, step in steps.items():
        use = step.generator
        assert use is not None
        lines.append(f"{protocol:<10}{use.messages_per_cpu_s:>20,.0f}{use.cpu_share:>12.0%}{use.lag_p99_ms:>18.1f}")
    lines.append("One process sends and receives all; the first column is about the most that it can take.")
    return "\n".join(lines)
