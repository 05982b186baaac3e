"""A quiet tenant beside floods of every shape, with real engines and the real scheduler, in steps of virtual time.

Every step takes the same time, so that waits are counted in steps, and are the same in every run.
"""

import asyncio
import functools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace

import pytest

from bench.virtual.line import VirtualEdge
from bench.virtual.loop import run_virtually
from bench.virtual.network import Network
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.scheduler.token_service import OUTPUT_COST
from scalellm.v1 import link_pb2
from virtual_histories import OK, VirtualStream
from virtual_services import VOCABULARY, Journal, ScriptedExecutor, WatchfulEdge, WatchfulScheduler

STEP = 0.01
ROWS = 36
NUM_QUIET = 7


class Executor(ScriptedExecutor):
    """An executor that only a large flood fills; it prefills in chunks of 512 tokens."""

    config = EngineConfig(
        num_blocks=ROWS * 160,
        max_model_len=4096,
        vocab_size=VOCABULARY,
        eos_token_ids=frozenset({0}),
        block_size=16,
        max_num_seqs=ROWS,
        max_num_batched_tokens=512,
    )


@dataclass
class Tenant:
    """A client of one tenant, which sends the same kind of request again and again."""

    name: str
    prompt_len: int
    max_tokens: int
    sent: list[VirtualStream]
    priority: int = 0
    weight: float = 1.0

    def stream(self) -> VirtualStream:
        rng = random.Random(f"{self.name} {len(self.sent)}")
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(self.prompt_len)]
        stream = VirtualStream(
            f"{self.name}-{len(self.sent)}", prompt, rng.getrandbits(32), 1, self.max_tokens, starts_at=0.0
        )
        make_submit = stream.make_submit

        def with_tenant() -> link_pb2.Submit:
            submit = make_submit()
            submit.tenant, submit.priority, submit.tenant_weight = self.name.encode(), self.priority, self.weight
            return submit

        stream.make_submit = with_tenant
        self.sent.append(stream)
        return stream

    async def send_for_ever(self, edge: VirtualEdge) -> None:
        while True:
            stream = self.stream()
            await stream.run(edge)
            if stream.codes != [OK]:
                await asyncio.sleep(10 * STEP)


class FairLine:
    """An executor, a scheduler, and an edge for each tenant, or one for all of them."""

    def __init__(self, *, is_edge_shared: bool = False, **settings: object) -> None:
        rng = random.Random(7)
        self.network = Network(lambda: 0.0002 * rng.uniform(0.5, 2))
        self.journal = Journal()
        even = SimpleNamespace(random=rng.random, uniform=lambda low, high: STEP)
        self.executor = Executor(self.network, "10.0.0.1:50061", self.journal, even)
        self.scheduler = WatchfulScheduler(self.network, "10.0.1.1:50052", [self.executor.address], **settings)
        self.sent: list[VirtualStream] = []
        self._shared_edge: VirtualEdge | None = None
        self.flooding: list[asyncio.Task[None]] = []
        if is_edge_shared:
            self._shared_edge = self.edge("shared")

    @property
    def engine(self) -> Engine:
        return self.executor.front.engine.engine

    def edge(self, name: str) -> VirtualEdge:
        if self._shared_edge is not None:
            return self._shared_edge
        return WatchfulEdge(self.network, name, [self.scheduler.address])

    def flood(
        self, name: str, num_clients: int, prompt_len: int, max_tokens: int, priority: int = 0, weight: float = 1.0
    ) -> None:
        edge = self.edge(name)
        tenant = Tenant(name, prompt_len, max_tokens, self.sent, priority, weight)
        self.flooding += [asyncio.create_task(tenant.send_for_ever(edge)) for _ in range(num_clients)]

    def num_tokens(self, name: str) -> int:
        """Tokens that a tenant's streams have received."""
        streams = [stream for stream in self.sent if stream.name.startswith(name)]
        return sum(len(tokens) for stream in streams for tokens in stream.tokens.values())

    async def quiet(self, num_requests: int = NUM_QUIET) -> list[float]:
        """Requests one after the other with a pause between them; the steps until the first token of each."""
        loop = asyncio.get_running_loop()
        edge = self.edge("quiet")
        tenant = Tenant("quiet", 100, 16, self.sent)
        waits = []
        for number in range(num_requests):
            stream = tenant.stream()
            began = loop.time()
            running = asyncio.create_task(stream.run(edge))
            while not stream.tokens and not running.done():
                await asyncio.sleep(STEP / 20)
            waits.append((loop.time() - began) / STEP)
            await running
            assert stream.codes == [OK], (number, stream.codes, stream.details)
            await asyncio.sleep((20 + number % 7) * STEP + STEP / 3)
        return waits

    async def end(self) -> None:
        """Everybody leaves: every token was the right one, and nothing is held."""
        for task in self.flooding:
            task.cancel()
        await asyncio.gather(*self.flooding, return_exceptions=True)
        await asyncio.sleep(10)
        for stream in self.sent:
            problems = [problem for problem in stream.problems(self.journal) if "ended 0 times" not in problem]
            assert not problems
        placement = self.scheduler.placement
        assert not placement.queue
        assert placement.service.num_active == 0
        assert placement.books.num_open == 0
        assert self.engine.load().free_blocks == self.engine.load().total_blocks
        self.engine.check_integrity()


def flood_tokens(line: FairLine) -> list[list[int]]:
    return [tokens for stream in line.sent if stream.name.startswith("flood") for tokens in stream.tokens.values()]


async def quiet_beside(flood: Callable[[FairLine], None] | None, **settings: object) -> tuple[list[float], FairLine]:
    line = FairLine(**settings)
    await asyncio.sleep(1.0)
    if flood is not None:
        flood(line)
        await asyncio.sleep(1.0)
    waits = await line.quiet()
    await line.end()
    return waits, line


@functools.cache
def waits_alone() -> list[float]:
    """The steps that a quiet tenant waits when there is nobody else. The same each time, as time is virtual."""
    waits, _ = run_virtually(quiet_beside(None), "alone")
    return waits


FLOODS: dict[str, Callable[[FairLine], None]] = {
    "short answers": lambda line: line.flood("flood", 60, 60, 64),
    "long answers": lambda line: line.flood("flood", 60, 60, 1000),
    "as many as rows": lambda line: line.flood("flood", ROWS, 60, 1000),
    "many streams": lambda line: line.flood("flood", 750, 60, 64),
    "long prompts": lambda line: line.flood("flood", 60, 3000, 4),
}


@pytest.mark.parametrize(("shape", "is_edge_shared"), [*((shape, False) for shape in FLOODS), ("short answers", True)])
def test_no_flood_delays_a_quiet_tenant_by_more_than_two_steps_and_a_chunk_of_prefill(shape, is_edge_shared):
    alone = waits_alone()
    beside, line = run_virtually(quiet_beside(FLOODS[shape], is_edge_shared=is_edge_shared), shape)
    assert max(beside) <= median(alone) + 3, (alone, beside)
    assert 0 < line.scheduler.placement.books.recalled <= 2 * NUM_QUIET, "no more than is needed"
    assert sum(map(len, flood_tokens(line))) > 100, "the flood is served, too"


def test_a_full_queue_refuses_no_request_of_a_quiet_tenant():
    alone = waits_alone()
    beside, line = run_virtually(
        quiet_beside(lambda line: line.flood("flood", 200, 60, 64), max_queued_requests=64), "full"
    )
    assert median(beside) <= median(alone) + 3, (alone, beside)
    refused = [stream for stream in line.sent if "queue is full" in stream.details]
    assert len(refused) > 100
    assert all(stream.name.startswith("flood") for stream in refused)


async def two_floods(first: tuple[int, int], second: tuple[int, int]) -> tuple[FairLine, float]:
    """Floods of (prompt length, answer length), the second when the first one holds all rows. How many more tokens the
    first was served than the second, at the end.
    """
    line = FairLine()
    await asyncio.sleep(1.0)
    line.flood("first", 60, *first)
    await asyncio.sleep(1.0)
    line.flood("second", 60, *second)
    await asyncio.sleep(300 * STEP)
    service = line.scheduler.placement.service
    ahead = service.served(b"first") - service.served(b"second")
    await line.end()
    return line, ahead


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((60, 1000), (60, 1000)),
        ((60, 1000), (60, 16)),
        ((60, 16), (60, 1000)),
        ((60, 64), (60, 64)),
        ((1000, 100), (60, 64)),
    ],
)
def test_two_floods_share_the_tokens_and_rows_do_not_go_to_and_fro(first, second):
    line, ahead = run_virtually(two_floods(first, second), f"{first} {second}")
    served_at_least = OUTPUT_COST * line.engine.stats().generated_tokens
    assert abs(ahead) < served_at_least / 10
    assert line.scheduler.placement.books.recalled <= 2 * ROWS


@pytest.mark.parametrize("max_tokens", [64, pytest.param(1000, marks=pytest.mark.slow)])
def test_shares_follow_weights(max_tokens):
    """Rows and tokens of two floods, the heavier of which comes when the other one holds all rows; by turns, and where
    answers are so long that rows have to be taken.
    """

    async def play() -> tuple[dict[str, int], dict[bytes, int]]:
        line = FairLine(max_queued_requests=64)
        await asyncio.sleep(1.0)
        line.flood("light", 80, 60, max_tokens, weight=0.5)
        await asyncio.sleep(1.0)
        begun = {name: line.num_tokens(name) for name in ("light", "heavy")}
        line.flood("heavy", 80, 60, max_tokens, weight=1.5)
        await asyncio.sleep(500 * STEP)
        tokens = {name: line.num_tokens(name) - begun[name] for name in begun}
        waiting = Counter(request.tenant for request in line.scheduler.placement.queue.in_order())
        await line.end()
        return tokens, waiting

    tokens, waiting = run_virtually(play(), f"weights {max_tokens}")
    assert 2.7 <= tokens["heavy"] / tokens["light"] <= 3.3, tokens
    if max_tokens == 64:  # else those wait as well whose rows were taken, and they are not sent away
        assert waiting[b"heavy"] == pytest.approx(3 * waiting[b"light"], rel=0.1), waiting


@pytest.mark.parametrize(("priority", "recalls"), [(-5, False), (5, True)])
def test_rows_of_more_urgent_requests_are_not_taken(priority, recalls):
    async def play() -> FairLine:
        line = FairLine()
        await asyncio.sleep(1.0)
        line.flood("flood", 40, 60, 300, priority)
        await asyncio.sleep(1.0)
        await line.quiet(3)
        await line.end()
        return line

    line = run_virtually(play(), "")
    assert (line.scheduler.placement.books.recalled > 0) == recalls
