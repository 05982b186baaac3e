"""Clients of one tenant, in a process of their own so that others' load does not make them late."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.v1 import common_pb2, generation_pb2
from scalellm.v1.generation_pb2_grpc import GenerationStub

_PER_CONNECTION = 100


@dataclass(frozen=True)
class Crowd:
    """Clients that ask one request after the other for some seconds, or requests at a rate of their own.

    Attributes:
        address: host:port of the tokenizer.
        key: The tenant's API key.
        clients: Number of clients; with `per_second`, of those who share the connections.
        num_tokens: Fewest and most tokens of an answer. Answers of one length that begin together also end together,
            which keeps the cores busy by turns and idle by turns.
        seconds: For how long new requests are sent. Those that run then are cancelled.
        pause: Seconds between an answer and the client's next request.
        after_refusal: Seconds that a refused client waits; None: as long as it was told, as clients should.
        starts_after: Seconds before the first request.
        per_second: Requests a second that come as a Poisson process, whatever became of those before; 0: each client
            has one at a time.
    """

    address: str
    key: str
    clients: int
    num_tokens: tuple[int, int]
    seconds: float
    pause: float = 0.0
    after_refusal: float | None = None
    starts_after: float = 0.0
    per_second: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """One request; times are of the machine's monotonic clock, in seconds.

    Attributes:
        first_at: Time at which the first tokens came; 0: none did.
        told: Seconds after which a refused client was told to try again; None: it was not.
    """

    started_at: float
    first_at: float
    ended_at: float
    code: str
    told: float | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first tokens."""
        return self.first_at - self.started_at

    @property
    def seconds(self) -> float:
        """From beginning to end."""
        return self.ended_at - self.started_at


@dataclass(frozen=True)
class Report:
    """Result of a crowd.

    Attributes:
        outcomes: Outcomes of every request that ended while it was there.
        cpu_s: CPU seconds that the clients took.
    """

    outcomes: list[Outcome]
    cpu_s: float


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for so many crowds at once."""
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def start(pool: ProcessPoolExecutor, crowd: Crowd) -> Future[Report]:
    """Let a crowd loose."""
    return pool.submit(_run, crowd)


def _run(crowd: Crowd) -> Report:
    began = time.process_time()
    outcomes = asyncio.run(_ask_all(crowd))
    return Report(outcomes, time.process_time() - began)


async def _ask_all(crowd: Crowd) -> list[Outcome]:
    await asyncio.sleep(crowd.starts_after)
    outcomes: list[Outcome] = []
    options = (("grpc.use_local_subchannel_pool", 1),)
    count = -(-crowd.clients // _PER_CONNECTION)
    channels = [grpc.aio.insecure_channel(crowd.address, options=options) for _ in range(count)]
    stubs = [GenerationStub(channel) for channel in channels]
    ask = _arrive if crowd.per_second else _come_back
    try:
        async with asyncio.timeout(crowd.seconds):
            await ask(crowd, stubs, outcomes)
    except TimeoutError:
        pass
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))
    return outcomes


async def _come_back(crowd: Crowd, stubs: Sequence[GenerationStub], outcomes: list[Outcome]) -> None:
    """Let each client ask again once its request has ended."""

    async def run(number: int) -> None:
        draw = random.Random(number)
        while True:
            outcome = await _ask(crowd, stubs[number % len(stubs)], number, draw)
            outcomes.append(outcome)
            if outcome.code == "OK":
                await asyncio.sleep(crowd.pause)
            else:
                await asyncio.sleep(crowd.after_refusal if crowd.after_refusal is not None else outcome.told or 1.0)

    await asyncio.gather(*map(run, range(crowd.clients)))


async def _arrive(crowd: Crowd, stubs: Sequence[GenerationStub], outcomes: list[Outcome]) -> None:
    """Send requests at the crowd's rate."""
    draw, due = random.Random(0), time.monotonic()

    async def run(number: int) -> None:
        outcomes.append(await _ask(crowd, stubs[number % len(stubs)], number, draw))

    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            due += draw.expovariate(crowd.per_second)
            await asyncio.sleep(due - time.monotonic())
            group.create_task(run(number))


async def _ask(crowd: Crowd, stub: GenerationStub, number: int, draw: random.Random) -> Outcome:
    request = generation_pb2.GenerateRequest(
        prompt=f"Client {number}. Once upon a time",
        sampling=common_pb2.SamplingParams(max_tokens=draw.randint(*crowd.num_tokens), ignore_eos=True),
        # A message more costs the clients' cores, which are the services', too.
        stream_interval=64,
    )
    metadata = (("authorization", f"Bearer {crowd.key}"),)
    started_at, first_at = time.monotonic(), 0.0
    code, told = "OK", None
    try:
        async for response in stub.Generate(request, metadata=metadata):
            if not first_at and response.WhichOneof("event") == "delta":
                first_at = time.monotonic()
    except grpc.aio.AioRpcError as error:
        code, told = error.code().name, _retry_after(error)
    return Outcome(started_at, first_at, time.monotonic(), code, told)


def _retry_after(error: grpc.aio.AioRpcError) -> float | None:
    metadata = error.trailing_metadata() or ()
    return StatusError.from_rpc(error.code(), error.details() or "", metadata).retry_after
