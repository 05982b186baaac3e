"""Random histories of faults on a virtual line, and what must be true of each: thousands of them a minute.

A history follows from its seed. Its streams' tokens are scripted by (seed, sample, offset, past), every token that any
engine emitted is in a journal, and every client's tokens are compared with both.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from dataclasses import dataclass, field

import grpc

from bench.virtual.line import VirtualEdge
from bench.virtual.loop import run_virtually
from bench.virtual.network import Network
from scalellm.services.common.errors import StatusError
from scalellm.v1 import link_pb2
from shaped_answers import GRAMMARS, problem, shaped_tokens
from virtual_services import Journal, ScriptedExecutor, WatchfulEdge, WatchfulScheduler, script, scripted_token

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
_PATIENCE = 600.0
_WAIT_UP = 5.0


@dataclass
class VirtualStream:
    """One request, what its client does, and what it got."""

    name: str
    prompt: list[int]
    seed: int
    num_samples: int
    max_tokens: int
    starts_at: float
    logprobs: bool = False
    session: str = ""
    cancel_after: int | None = None
    stop_after: int | None = None
    timeout: float | None = None
    grammar: str = ""
    tenant: tuple[bytes, float] = (b"", 1.0)
    """The name and the weight. Tenants of little weight lose rows to those of much."""
    tokens: dict[int, list[int]] = field(default_factory=dict)
    codes: list[grpc.StatusCode] = field(default_factory=list)
    details: str = ""
    was_resumed: bool = False

    @staticmethod
    def draw(name: str, rng: random.Random) -> VirtualStream:
        kinds = ("plain", "samples", "logprobs", "session", "stop", "deadline", "cancel", "shaped", "shaped samples")
        kind = rng.choice(kinds)
        return VirtualStream(
            name,
            [rng.randrange(1, 1000) for _ in range(rng.randint(1, 40))],
            rng.getrandbits(32),
            rng.randint(2, 3) if kind.endswith("samples") else 1,
            rng.randint(1, 40),
            rng.uniform(0, 0.5),
            logprobs=kind == "logprobs",
            session=rng.choice("ABC") if kind == "session" else "",
            cancel_after=rng.randint(0, 20) if kind == "cancel" else None,
            stop_after=rng.randint(1, 20) if kind == "stop" else None,
            timeout=rng.uniform(0.05, 2) if kind == "deadline" else None,
            grammar=rng.choice(GRAMMARS) if kind.startswith("shaped") else "",
            tenant=rng.choice(((b"", 1.0), (b"light", 0.01), (b"heavy", 100.0))),
        )

    def make_submit(self) -> link_pb2.Submit:
        submit = link_pb2.Submit(request_id=self.name, token_ids=self.prompt, cache_salt=b"s", session_id=self.session)
        submit.sampling.n = self.num_samples
        submit.sampling.seed = self.seed
        submit.sampling.max_tokens = self.max_tokens
        submit.sampling.ignore_eos = not self.grammar
        submit.grammar = self.grammar
        submit.tenant, submit.tenant_weight = self.tenant
        if self.logprobs:
            submit.sampling.logprobs = 1
        if self.timeout is not None:
            submit.time_remaining_ns = int(self.timeout * 1e9)
        return submit

    async def run(self, edge: VirtualEdge) -> None:
        """Run the request as the edge does for a client."""
        await asyncio.sleep(self.starts_at)
        try:
            async with asyncio.timeout(self.timeout):
                await self._follow(edge)
        except TimeoutError:
            self.codes.append(grpc.StatusCode.DEADLINE_EXCEEDED)
        except StatusError as error:
            self.codes.append(error.code)
            self.details = error.message

    async def _follow(self, edge: VirtualEdge) -> None:
        await edge.link.wait_up(_WAIT_UP)
        receiver = edge.link.submit(self.make_submit())
        reason = link_pb2.ABORT_REASON_DEADLINE
        try:
            while receiver.finish is None or receiver.has_more:
                await receiver.wait()
                for batch in receiver.take():
                    ids = self.tokens.setdefault(batch.index, [])
                    ids += batch.token_ids
                    is_stop = self.stop_after is not None and len(ids) >= self.stop_after
                    if is_stop and batch.finish is None:
                        edge.link.stop_sample(receiver, batch.index)
                if self.cancel_after is not None and len(self.tokens.get(0, ())) >= self.cancel_after:
                    reason = link_pb2.ABORT_REASON_CANCELLED
                    self.codes.append(grpc.StatusCode.CANCELLED)
                    return
            finish = receiver.finish
            if finish.status.code:
                raise StatusError.from_link(finish.status)
            self.codes.append(OK)
            self.was_resumed = bool(finish.usage.num_resumed or finish.timings.failover_ns)
        finally:
            edge.link.release(receiver, reason)

    def problems(self, journal: Journal) -> list[str]:
        """Describe the errors in what the client received."""
        found = []
        if len(self.codes) != 1:
            found.append(f"ended {len(self.codes)} times: {self.codes}")
        due = [self._due(index) for index in range(self.num_samples)]
        for index, ids in self.tokens.items():
            for offset, (token, wanted) in enumerate(zip(ids, due[index], strict=False)):
                if token != wanted:
                    found.append(f"sample {index}, token {offset} is {token}, not {wanted}")
                    break
                if journal.tokens.get((self.name, index, offset)) != {token}:
                    emitted = journal.tokens.get((self.name, index, offset))
                    found.append(f"sample {index}, token {offset} is {token}; engines emitted {emitted}")
            if len(ids) > len(due[index]):
                found.append(f"sample {index} has {len(ids)} tokens, more than {len(due[index])}")
        if self.codes[:1] == [OK]:
            for index, wanted in enumerate(due):
                ids, least = self.tokens.get(index, []), len(wanted)
                if self.stop_after is not None:
                    least = min(least, self.stop_after)
                if len(ids) < least:
                    found.append(f"sample {index} ended OK with {len(ids)} tokens, {least} are due")
                if self.grammar and (said := problem(self.grammar, ids, self.max_tokens)):
                    found.append(f"sample {index}: {said}")
        return [f"{self.name}: {what}" for what in found]

    def _due(self, index: int) -> list[int]:
        """The tokens of a sample that nothing ends early."""
        if self.grammar:
            numbers = functools.partial(script, self.seed, index)
            return shaped_tokens(self.grammar, numbers, self.prompt[-1], self.max_tokens)
        ids = [self.prompt[-1]]
        for offset in range(self.max_tokens):
            ids.append(scripted_token(self.seed, index, offset, ids[-1]))
        return ids[1:]


@dataclass
class History:
    """One run: what happened, and how it ended."""

    seed: str
    events: list[str] = field(default_factory=list)
    streams: list[VirtualStream] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    scheduler_faults: int = 0
    executor_faults: int = 0
    recalled: int = 0

    def counts(self) -> Counter[str]:
        """Streams by status, how many were taken up by another executor, and how often one lost its rows to another
        tenant's.
        """
        found = Counter(stream.codes[0].name for stream in self.streams if stream.codes)
        found["resumed"] = sum(stream.was_resumed for stream in self.streams)
        found["recalled"] = self.recalled
        return found

    def describe(self) -> str:
        """For whoever has to find out why."""
        return "\n".join([f"history {self.seed}:", *self.problems, "what happened:", *self.events])


def play(seed: str) -> History:
    """Play one history. Whatever goes wrong is in its `problems`."""
    history = History(seed)
    try:
        run_virtually(_play(history, random.Random(seed)), seed)
    except Exception as error:  # a task that died or hangs is what is looked for
        history.problems.append(f"the run itself failed: {error!r}")
    return history


class _Line:
    def __init__(self, history: History, rng: random.Random) -> None:
        self.history, self.rng = history, rng
        self.loop = asyncio.get_running_loop()
        self.network = Network(lambda: 0.0002 * rng.uniform(0.5, 2))
        self.journal = Journal()
        addresses = [f"10.0.0.{number}:50061" for number in range(1, 1 + rng.randint(1, 3))]
        self.executors = [ScriptedExecutor(self.network, address, self.journal, rng) for address in addresses]
        self.schedulers = [
            WatchfulScheduler(self.network, f"10.0.1.{number}:50052", addresses)
            for number in range(1, 1 + rng.randint(1, 2))
        ]
        schedulers = [scheduler.address for scheduler in self.schedulers]
        self.edges = [WatchfulEdge(self.network, f"edge-{number}", schedulers) for number in (1, 2)]

    def note(self, what: str) -> None:
        self.history.events.append(f"{self.loop.time():8.3f} {what}")

    async def fault(self) -> None:
        """Inject a fault that is drawn, into a process that is drawn among those it can meet."""
        kind = self.rng.choice((
            self._engine_dies, self._executor_dies, self._executor_leaves, self._engine_stops, self._executor_is_cut,
            self._scheduler_dies, self._scheduler_leaves, self._scheduler_is_cut, self._connection_breaks,
            self._reader_is_slow,
        ))  # fmt: skip
        self.history.executor_faults += kind in (
            self._engine_dies, self._executor_dies, self._executor_leaves, self._engine_stops, self._executor_is_cut,
            self._connection_breaks,
        )  # fmt: skip
        await kind()

    async def _engine_dies(self) -> None:
        executor, seconds = self.rng.choice(self.executors), self.rng.uniform(0, 1.5)
        self.note(f"the engine of {executor.address} dies, another one comes in {seconds:.2f} s")
        if executor.process.is_alive:
            await executor.front.kill_engine(seconds)

    async def _executor_dies(self) -> None:
        executor, seconds = self.rng.choice(self.executors), self.rng.uniform(0, 1.5)
        if executor.process.is_alive:
            self.note(f"{executor.address} dies, another one comes in {seconds:.2f} s")
            executor.die()
            await asyncio.sleep(seconds)
            executor.start()

    async def _executor_leaves(self) -> None:
        executor, limit = self.rng.choice(self.executors), self.rng.uniform(0, 0.5)
        if executor.process.is_alive:
            self.note(f"{executor.address} drains for {limit:.2f} s, then leaves and comes back")
            executor.front.drain()
            await asyncio.sleep(limit)
            if executor.process.is_alive:
                executor.die()
                await asyncio.sleep(self.rng.uniform(0, 1))
                executor.start()

    async def _engine_stops(self) -> None:
        executor, seconds = self.rng.choice(self.executors), self.rng.choice((0.2, 1, 5))
        self.note(f"the engine of {executor.address} stands still for {seconds} s")
        executor.front.engine.stop(seconds)
        await asyncio.sleep(seconds)

    async def _executor_is_cut(self) -> None:
        await self._cut(self.rng.choice(self.executors).address)

    async def _scheduler_is_cut(self) -> None:
        self.history.scheduler_faults += 1
        await self._cut(self.rng.choice(self.schedulers).address)

    async def _cut(self, address: str) -> None:
        seconds = self.rng.choice((0.1, 1, 5))
        self.note(f"{address} is cut off for {seconds} s")
        self.network.cut(address)
        await asyncio.sleep(seconds)
        self.network.mend(address)

    async def _scheduler_dies(self) -> None:
        self.history.scheduler_faults += 1
        scheduler, seconds = self.rng.choice(self.schedulers), self.rng.uniform(0, 1.5)
        if scheduler.process.is_alive:
            self.note(f"{scheduler.address} dies, another one comes in {seconds:.2f} s")
            await scheduler.die()
            await asyncio.sleep(seconds)
            scheduler.start()

    async def _scheduler_leaves(self) -> None:
        self.history.scheduler_faults += 1
        scheduler, limit = self.rng.choice(self.schedulers), self.rng.uniform(0, 0.5)
        process = scheduler.process
        if process.is_alive and not scheduler.dispatchers.is_draining:
            self.note(f"{scheduler.address} drains for {limit:.2f} s, then leaves and comes back")
            await scheduler.drain(limit)
            if scheduler.process is process:
                scheduler.start()

    async def _connection_breaks(self) -> None:
        connections = sorted(self.network.connections, key=lambda connection: connection.address)
        if connections:
            connection = self.rng.choice(connections)
            is_scheduler = any(connection.address == scheduler.address for scheduler in self.schedulers)
            self.history.scheduler_faults += is_scheduler
            self.note(f"a connection to {connection.address} breaks")
            connection.reset()

    async def _reader_is_slow(self) -> None:
        connections = sorted(self.network.connections, key=lambda connection: connection.address)
        if connections:
            connection, seconds = self.rng.choice(connections), self.rng.uniform(0.1, 2)
            self.note(f"a client of {connection.address} does not read for {seconds:.2f} s")
            connection.reads_slowly_until = self.loop.time() + seconds

    async def rest(self) -> list[str]:
        """Wait until everything could end; return what is still held and which counters do not add up."""
        found: list[str] = []
        for _ in range(40):
            await asyncio.sleep(0.5)
            if not (found := self._held()):
                break
        return found

    def _held(self) -> list[str]:
        found = []
        for executor in self.executors:
            engine = executor.front.engine.engine
            load = engine.load()
            if engine.has_unfinished() or load.running or load.waiting or load.free_blocks != load.total_blocks:
                found.append(f"{executor.address} holds requests or blocks: {load}")
            engine.check_integrity()
            stats = engine.stats()
            if stats.accepted != stats.finished + stats.cancelled + stats.deadline_exceeded + stats.failed:
                found.append(f"{executor.address}: the books do not add up: {stats}")
        for scheduler in self.schedulers:
            books, queue = scheduler.placement.books, scheduler.placement.queue
            if books.accepted != books.finished + books.cancelled + books.rejected:
                found.append(f"{scheduler.address}: the books do not add up: {vars(books)}")
            if queue or scheduler.fleet.num_running:
                found.append(f"{scheduler.address} holds {len(queue)} + {scheduler.fleet.num_running} requests")
        waiting = [edge for edge in self.edges if edge.link.num_handles]
        found += [f"{edge.process.name} waits for {edge.link.num_handles} requests to end" for edge in waiting]
        return found


async def _play(history: History, rng: random.Random) -> None:
    line = _Line(history, rng)
    await asyncio.sleep(1)
    history.streams = [VirtualStream.draw(f"r{number}", rng) for number in range(rng.randint(4, 12))]
    running = [asyncio.create_task(stream.run(rng.choice(line.edges))) for stream in history.streams]

    async def strike(after: float) -> None:
        await asyncio.sleep(after)
        await line.fault()

    strikes = [asyncio.create_task(strike(rng.uniform(0, 1.5))) for _ in range(rng.randint(1, 4))]
    done, pending = await asyncio.wait([*running, *strikes], timeout=_PATIENCE)
    history.problems += [f"a task has not ended: {task}" for task in pending]
    history.problems += [f"a task failed: {task.exception()!r}" for task in done if task.exception() is not None]
    for stream in history.streams:
        history.problems += stream.problems(line.journal)
        history.problems += _unpromised(history, stream)
    history.problems += await line.rest()
    history.recalled = sum(scheduler.placement.books.recalled for scheduler in line.schedulers)


def _unpromised(history: History, stream: VirtualStream) -> list[str]:
    allowed = {OK}
    if stream.timeout is not None:
        allowed.add(grpc.StatusCode.DEADLINE_EXCEEDED)
    if stream.cancel_after is not None:
        allowed.add(grpc.StatusCode.CANCELLED)
    if history.scheduler_faults and not stream.tokens:
        allowed.add(UNAVAILABLE)  # it came while no scheduler was there
    if history.executor_faults >= 2:  # two engines in a row may be lost under it before it has a token
        allowed.add(grpc.StatusCode.INTERNAL)
    if stream.codes and stream.codes[0] not in allowed:
        return [f"{stream.name} ended {stream.codes[0].name}: {stream.details}"]
    return []
