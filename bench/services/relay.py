"""`python -m bench.services.relay`: stands in a scheduler's place and passes bytes on, on the same gRPC and event loop.

What a frame costs here is what it costs at least: a scheduler's own share is what it takes beyond that.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import uvloop

from scalellm.services.common.lifecycle import CHANNEL_OPTIONS, SERVER_OPTIONS, announce


class Relay:
    """`Scheduler.Connect` on one executor.

    Args:
        executor: host:port.
    """

    def __init__(self, executor: str) -> None:
        self._executor = executor

    async def connect(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serve one link."""
        async with grpc.aio.insecure_channel(self._executor, options=CHANNEL_OPTIONS) as channel:
            call = channel.stream_stream("/scalellm.v1.Executor/Execute")()

            async def pass_down() -> None:
                async for frame in frames:
                    await call.write(frame)

            passing = asyncio.create_task(pass_down())
            try:
                while (frame := await call.read()) is not grpc.aio.EOF:
                    await context.write(frame)
            finally:
                passing.cancel()


async def serve(executor: str, announced: Path) -> None:
    """Serve until killed."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {"Connect": grpc.stream_stream_rpc_method_handler(Relay(executor).connect)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("scalellm.v1.Scheduler", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.freeze()
    gc.set_threshold(20_000)  # as in the scheduler
    announce(announced, f"127.0.0.1:{port}")
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port")  # every service is given one
    parser.add_argument("--announce", type=Path, required=True)
    parser.add_argument("--executors", required=True)
    options = parser.parse_args()
    uvloop.run(serve(options.executors, options.announce))


if __name__ == "__main__":
    main()
