"""A neighbour's process. Its role is one JSON line on stdin; then each line is a command, answered with one line."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from typing import Any

from bench.services.neighbours.clients import Clients
from bench.services.neighbours.edge import LinkEdge
from bench.services.neighbours.engine import SimulatedEngines
from bench.services.neighbours.http_clients import HttpClients


async def _make(role: str, options: dict[str, Any]) -> Clients | HttpClients | LinkEdge | SimulatedEngines:
    match role:
        case "clients":
            return Clients(**options)
        case "http_clients":
            return HttpClients(**options)
        case "edge":
            return LinkEdge(**options)
        case "engines":
            engines = SimulatedEngines(**options)
            await engines.listen()
            return engines
    raise ValueError(f"role {role!r} is not known")


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    neighbour = await _make(**json.loads(await reader.readline()))
    _answer({"addresses": getattr(neighbour, "addresses", [])})
    # Nothing here makes cycles worth a pause in the middle of a measurement.
    gc.freeze()
    gc.disable()
    while line := await reader.readline():
        command = json.loads(line)
        do = command.pop("do")
        if do == "start":
            await neighbour.start(**command)
            _answer({})
        elif do == "take":
            _answer(neighbour.take())
        else:
            await neighbour.stop()
            gc.collect()
            _answer({})


def _answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve())
