"""Messages of every public method and frames of every link with odd content: each is answered or refused, none hurts.

A failure names the seed and the number of the message, from which it follows:
`HOSTILE_SEED=7 HOSTILE_ONLY=1234` sends it alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from hostile_send import attack, describe
from line import Line
from scalellm.services.common.link import API_MINOR
from scalellm.v1 import generation_pb2, link_pb2, sessions_pb2, tokenizer_pb2
from service_processes import PATIENCE
from structured_messages import structured
from vital_signs import services

HELLO = link_pb2.ClientFrame(hello=link_pb2.Hello(client_id="hostile", api_minor=API_MINOR)).SerializeToString()
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"],
    tokenizer_pb2.DESCRIPTOR.services_by_name["Tokenizer"],
    sessions_pb2.DESCRIPTOR.services_by_name["Sessions"],
)
PUBLIC = tuple(
    (f"/{service.full_name}/{method.name}", method.input_type) for service in SERVICES for method in service.methods
)
LINKS = {"scheduler": "/scalellm.v1.Scheduler/Connect", "executor": "/scalellm.v1.Executor/Execute"}
CRASHES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
OWN = [("grpc.use_local_subchannel_pool", 1)]


def code_of(call: Any) -> grpc.StatusCode:
    """Read a call to its end. Raises AssertionError when it ends as of a crash."""
    try:
        for _ in call:
            pass
    except grpc.RpcError:
        pass
    code = call.code()
    assert code not in CRASHES, f"ended {code.name}: {call.details()}"
    return code


async def test_public_messages(line: Line, table: list[str], seconds: float, run_seed: int) -> None:
    with grpc.insecure_channel(line.address, OWN) as channel:
        methods = {method: channel.unary_stream(method) for method, _ in PUBLIC}

        async def send(number: int) -> str:
            rng = random.Random(f"public {run_seed} {number}")
            method, descriptor = rng.choice(PUBLIC)
            data = structured(descriptor, rng)
            # A long answer, also one that is kept, is ended by its deadline; everything else ends by itself.
            is_long = method.endswith(("/Generate", "/Resume"))
            call = methods[method](data, timeout=rng.choice((0.05, 0.5, 2)) if is_long else PATIENCE)
            code = await asyncio.to_thread(code_of, call)
            assert is_long or code is not grpc.StatusCode.DEADLINE_EXCEEDED, f"{method} hangs"
            return code.name

        await attack(line, table, describe(run_seed, "public messages"), seconds / 2, send)


@pytest.mark.parametrize("service", LINKS)
async def test_link_frames(line: Line, table: list[str], seconds: float, run_seed: int, service: str) -> None:
    with grpc.insecure_channel(services(line)[service].address, OWN) as channel:
        connect = channel.stream_stream(LINKS[service])

        async def send(number: int) -> str:
            rng = random.Random(f"{service} {run_seed} {number}")
            frames = [structured(link_pb2.ClientFrame.DESCRIPTOR, rng) for _ in range(rng.randint(1, 8))]
            if rng.random() < 0.95:
                frames.insert(0, HELLO)
            stay = rng.choice((0.0, 0.0, 0.05))

            def requests() -> Iterator[bytes]:
                yield from frames
                time.sleep(stay)

            # Requests of a link may run on after its last frame: the deadline ends what nobody would.
            return (await asyncio.to_thread(code_of, connect(requests(), timeout=3))).name

        await attack(line, table, describe(run_seed, f"{service}'s frames"), seconds / 4, send)
