"""Executors, schedulers and edges of a line in one process and on virtual time: the real objects, but for sockets.

Real are engine, its links and loop, the executor's servicer, the scheduler with its fleet, and the edge's link. Virtual
are the network, the front's connection to its engine, and the model, whose tokens are scripted.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any

from scalellm.v1 import executor_pb2, link_pb2
from services.common.errors import StatusError
from services.common.health import Heartbeat
from services.common.link import LinkTraffic, token_runs
from services.executor.build import LoadedEngine
from services.executor.engine.batch import ScheduledSequence
from services.executor.engine.config import EngineConfig
from services.executor.engine.engine import Engine
from services.executor.engine.fake_model_runner import STEP_TIME_PRESETS, FakeModelRunner
from services.executor.engine_process import EngineLoop
from services.executor.front import ExecutorServicer
from services.executor.grammar import Masks
from services.executor.ipc import Kind, Message
from services.scheduler.affinity_store import AffinityStore
from services.scheduler.config import SchedulerSettings
from services.scheduler.fleet import Fleet
from services.scheduler.intake import Intake
from services.scheduler.placement import Placement
from services.scheduler.service import SchedulerService
from services.tokenizer.schedulers import Schedulers
from shaped_answers import EOS, SIZE, CompilesAtOnce
from virtual_loop import VirtualLoop
from virtual_network import Network, VirtualDialer, VirtualProcess

VOCABULARY = SIZE
TOKENIZER = b"virtual"
SILENCE_LIMIT = 3.0
LEASE = 2.0
_BEAT = 0.5
_START_LIMIT = 2.0


def script(seed: int, index: int, offset: int, previous: int) -> int:
    """What says which token sample `index` has at `offset`, modulo how many there are to choose from."""
    mixed = (seed * 2654435761 + index * 40503 + offset * 2246822519 + previous * 3266489917 + 374761393) % 2**32
    return mixed ^ (mixed >> 15)


def scripted_token(seed: int, index: int, offset: int, previous: int) -> int:
    """The token that sample `index` has at `offset`: no two samples, offsets or pasts have the same, but by chance."""
    return 1 + script(seed, index, offset, previous) % (VOCABULARY - 1)


class Journal:
    """What all engines ever emitted, by (request id, sample, offset): the token, and how often."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int, int], set[int]] = defaultdict(set)
        self.emissions = 0

    def record(self, request_id: str, index: int, offset: int, token_ids: Collection[int]) -> None:
        """An engine emitted these."""
        for place, token in enumerate(token_ids):
            self.tokens[request_id, index, offset + place].add(token)
            self.emissions += 1


class ScriptedRunner(FakeModelRunner):
    """Answers at once, by the script; how long a step takes is the engine's business."""

    def __init__(self, num_rows: int, clock: Callable[[], float], *, overlaps: bool) -> None:
        masks = Masks(num_rows, VOCABULARY)
        times = STEP_TIME_PRESETS["instant"]
        super().__init__(VOCABULARY, {EOS}, times, clock=clock, overlaps=overlaps, masks=masks)

    def number(self, previous: int, scheduled: ScheduledSequence) -> int:
        """By the sample's seed, index and offset as well."""
        seq = scheduled.seq
        return script(seq.group.request.sampling.seed or 0, seq.index, scheduled.num_output_tokens, previous)


class VirtualExecutor:
    """An executor: a front process that comes back, and an engine below it that does, too."""

    def __init__(self, network: Network, address: str, journal: Journal, rng: random.Random) -> None:
        self.address = address
        self.journal = journal
        self._network = network
        self._rng = rng
        self._num_starts = 0
        self.start()

    def start(self) -> None:
        """A new front, with a new engine."""
        self.process = VirtualProcess(self.address)
        self.front = _Front(self)
        servicer = ExecutorServicer(self.front, SimpleNamespace(drain_limit_s=1.0, lease_s=LEASE))
        self._network.serve(self.address, self.process, servicer.Execute)

    def new_engine(self) -> tuple[Engine, link_pb2.Welcome]:
        """The next incarnation."""
        self._num_starts += 1
        config = EngineConfig(
            num_blocks=64,
            max_model_len=256,
            vocab_size=VOCABULARY,
            eos_token_ids=frozenset({EOS}),
            block_size=4,
            max_num_seqs=8,
            max_num_batched_tokens=64,
        )
        engine = self.make_engine(config)
        welcome = link_pb2.Welcome(
            instance_id=f"{self.address}#{self._num_starts}",
            model="virtual",
            tokenizer_sha256=TOKENIZER,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            vocab_size=VOCABULARY,
            grammars=True,
        )
        return engine, welcome

    def make_engine(self, config: EngineConfig) -> Engine:
        """One of this size."""
        clock = asyncio.get_running_loop().time
        runner = ScriptedRunner(config.max_num_seqs, clock, overlaps=self._rng.random() < 0.5)
        return Engine(config, runner, clock, grammars=CompilesAtOnce())

    def die(self) -> None:
        """Front and engine, as by kill -9 of the front: the engine follows."""
        self.process.die()
        self.front.engine.end()


class _Front:
    """In place of the EngineSupervisor: the same calls for the servicer."""

    def __init__(self, executor: VirtualExecutor) -> None:
        self.traffic = LinkTraffic()
        self.info = executor_pb2.GetExecutorInfoResponse()
        self._executor = executor
        self._ports: dict[int, Any] = {}
        self._next_link = 1
        self._is_ready = asyncio.Event()
        self.is_draining = False
        self.start_engine()

    def start_engine(self) -> None:
        self.engine = _EngineOnTurns(self, *self._executor.new_engine())
        self._is_ready.set()

    async def kill_engine(self, seconds: float) -> None:
        """The engine dies; another one is there after some seconds, unless the front died, too."""
        self.engine.end()
        self._is_ready.clear()
        ports, self._ports = self._ports, {}
        for port in ports.values():
            port.on_end(StatusError.unavailable("the engine process died", retry_after=1.0))
        await asyncio.sleep(seconds)
        if self._executor.process.is_alive and not self._is_ready.is_set():
            self.start_engine()

    async def open_link(self, hello: bytes, port: Any) -> int:
        try:
            async with asyncio.timeout(_START_LIMIT):
                await self._is_ready.wait()
        except TimeoutError:
            raise StatusError.unavailable("the engine is starting", retry_after=1.0) from None
        number = self._next_link
        self._next_link += 1
        self._ports[number] = port
        self.engine.deliver(Message(Kind.OPEN, number, hello))
        return number

    def send_frame(self, link: int, frame: bytes) -> None:
        if link in self._ports:
            self.engine.deliver(Message(Kind.FRAME, link, frame))

    def close_link(self, link: int) -> None:
        if self._ports.pop(link, None) is not None:
            self.engine.deliver(Message(Kind.CLOSE, link))

    def drain(self) -> None:
        self.is_draining = True
        self.engine.deliver(Message(Kind.DRAIN))

    def on_message(self, message: Message) -> None:
        port = self._ports.get(message.link)
        if message.kind is Kind.STATS:
            self.info = executor_pb2.GetExecutorInfoResponse.FromString(message.payload)
        elif port is None:
            return
        elif message.kind is Kind.WELCOME:
            port.on_welcome(message.payload)
        elif message.kind is Kind.FRAME:
            port.on_frame(message.payload)
        elif message.kind is Kind.REFUSE:
            del self._ports[message.link]
            port.on_end(StatusError.from_link(link_pb2.LinkStatus.FromString(message.payload)))


class _EngineOnTurns:
    """An engine process: an EngineLoop that takes its turns when something came and, with work, step after step."""

    def __init__(self, front: _Front, engine: Engine, welcome: link_pb2.Welcome) -> None:
        self.engine = engine
        self._front = front
        self._loop = asyncio.get_running_loop()
        self._rng = front._executor._rng
        self._journal = front._executor.journal
        self._inbox: deque[Message] = deque()
        self._requests: dict[tuple[int, int], str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False
        self._stopped_until = 0.0
        loaded = LoadedEngine(engine, welcome, executor_pb2.GetExecutorInfoResponse())
        self._turns = EngineLoop(loaded, self, clock=self._loop.time)
        self._schedule(0)

    def deliver(self, message: Message) -> None:
        """The front sent something."""
        if message.kind is Kind.FRAME:
            frame = link_pb2.ClientFrame.FromString(message.payload)
            if frame.WhichOneof("frame") == "submit":
                self._requests[message.link, frame.submit.handle] = frame.submit.request_id
        self._inbox.append(message)
        if not self.engine.has_unfinished():
            self._schedule(0)

    def stop(self, seconds: float) -> None:
        """Stand still."""
        self._stopped_until = max(self._stopped_until, self._loop.time() + seconds)

    def end(self) -> None:
        """Die."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()

    # What EngineLoop needs of its channel.

    def receive(self, timeout: float) -> Iterator[Message]:
        """What has come."""
        while self._inbox:
            yield self._inbox.popleft()

    def send(self, *messages: Message) -> None:
        """To the front; what is emitted goes into the journal."""
        for message in messages:
            if message.kind is Kind.FRAME:
                self._record(message)
            self._front.on_message(message)

    def _record(self, message: Message) -> None:
        step = link_pb2.ServerFrame.FromString(message.payload).step
        for handle, index, offset, token_ids in token_runs(step):
            self._journal.record(self._requests[message.link, handle], index, offset, token_ids)

    def _schedule(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._turn)

    def _turn(self) -> None:
        if self._is_over:
            return
        if (left := self._stopped_until - self._loop.time()) > 0:
            self._schedule(left)
            return
        self._turns.turn()
        self._schedule(self._rng.uniform(0.005, 0.02) if self.engine.has_unfinished() else _BEAT)


class VirtualScheduler:
    """A scheduler process that comes back."""

    def __init__(
        self, network: Network, address: str, executors: Collection[str], settings: SchedulerSettings | None = None
    ) -> None:
        self.address = address
        self._network = network
        self._settings = settings or SchedulerSettings(stall_limit_s=SILENCE_LIMIT)
        self._executors = executors
        self._num_starts = 0
        self.start()

    def start(self) -> None:
        """A new incarnation."""
        self._num_starts += 1
        loop = asyncio.get_running_loop()
        instance = f"{self.address}#{self._num_starts}"
        self.process = VirtualProcess(instance)
        dialer = VirtualDialer(self._network, self.process)
        self.fleet = Fleet(instance, SILENCE_LIMIT, dialer)
        affinity = AffinityStore(None, 60)
        heartbeat = Heartbeat(SILENCE_LIMIT, clock=loop.time)
        self.placement = Placement(self._settings, self.fleet, affinity, heartbeat)
        self.intake = Intake(self.placement)
        service = SchedulerService(instance, 1.0, self.intake, self.placement, self.fleet, None, affinity, LEASE)
        self.placement.start()
        for address in self._executors:
            self.fleet.add(address)
        self._network.serve(self.address, self.process, service.Connect)

    async def die(self) -> None:
        """As by kill -9."""
        self.process.die()
        self.placement.stop()
        await self.fleet.stop()

    async def drain(self, limit: float) -> None:
        """As on SIGTERM."""
        self.intake.begin_drain()
        await self.placement.wait_idle(limit)
        self.intake.end_all(StatusError.unavailable("the scheduler stopped", retry_after=1.0), moved=True)
        await asyncio.sleep(0.1)  # the last words
        await self.die()


class VirtualEdge:
    """A tokenizer worker's links."""

    def __init__(self, network: Network, name: str, schedulers: Collection[str]) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.process = VirtualProcess(name)
        self.link = Schedulers(
            tuple(schedulers),
            name,
            TOKENIZER,
            silence_limit=SILENCE_LIMIT,
            dialer=VirtualDialer(network, self.process),
            clock=loop.time_ns,
        )
        self._running = asyncio.create_task(self.link.run())
