"""An executor on virtual time: the real engine, its links and its loop, and the real servicer before it.

Virtual are the front's connection to its engine, and the time that a step takes: the runner lets it pass on the
engine's own `StepClock`, and what a step emits leaves when it is over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from bench.virtual.network import Network, VirtualProcess
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import LinkTraffic
from scalellm.services.executor.build import LoadedEngine
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine_load import welcome
from scalellm.services.executor.engine_process import EngineLoop
from scalellm.services.executor.frame_window import FrameWindow
from scalellm.services.executor.front import ExecutorServicer
from scalellm.services.executor.ipc import Kind, Message
from scalellm.v1 import executor_pb2, link_pb2

TOKENIZER = b"virtual"
_START_LIMIT = 2.0
_DRAIN_LIMIT = 1.0


class StepClock:
    """The clock of an engine whose step is computed at one instant of `now`, although it takes time.

    Args:
        now: Seconds.

    Attributes:
        ahead: Seconds of the step so far.
    """

    def __init__(self, now: Callable[[], float] = lambda: 0.0) -> None:
        self._now = now
        self.ahead = 0.0

    def __call__(self) -> float:
        """The time, in seconds."""
        return self._now() + self.ahead

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.ahead += seconds


class VirtualExecutor:
    """An executor: a front process that comes back, and an engine below it that does, too.

    Args:
        network: Network on which it listens.
        address: host:port.
        make_engine: Makes each incarnation's engine, on its clock.
        tensor_parallel: Devices that it says it has.
        lease: See ExecutorSettings.lease_s.
        watch: Told of each message that the engine receives (True) or sends (False).

    Attributes:
        cpu_s: CPU seconds of its engines.
    """

    def __init__(
        self,
        network: Network,
        address: str,
        make_engine: Callable[[StepClock], Engine],
        *,
        tensor_parallel: int = 1,
        lease: float = 30.0,
        watch: Callable[[Message, bool], None] | None = None,
    ) -> None:
        self.address = address
        self.watch = watch
        self._tensor_parallel = tensor_parallel
        self.cpu_s = 0.0
        self._network = network
        self._make_engine = make_engine
        self._settings: Any = SimpleNamespace(drain_limit_s=_DRAIN_LIMIT, lease_s=lease)
        self._num_starts = 0
        self.start()

    def start(self) -> None:
        """A new front, with a new engine."""
        self.process = VirtualProcess(self.address)
        self.front = VirtualFront(self)
        front: Any = self.front
        self._network.serve(self.address, self.process, ExecutorServicer(front, self._settings).Execute)

    def load(self, clock: StepClock) -> LoadedEngine:
        """The next incarnation."""
        self._num_starts += 1
        engine = self._make_engine(clock)
        greeting = welcome(
            engine,
            instance_id=f"{self.address}#{self._num_starts}",
            model="virtual",
            tokenizer_sha256=TOKENIZER,
            tensor_parallel=self._tensor_parallel,
        )
        clock.ahead = 0.0  # what was measured before serving
        return LoadedEngine(engine, greeting, executor_pb2.GetExecutorInfoResponse())

    def die(self) -> None:
        """Front and engine, as by kill -9 of the front: the engine follows."""
        self.process.die()
        self.front.engine.end()

    async def leave(self, limit: float) -> None:
        """Leave as on SIGTERM: no new requests, and what has not ended within the limit, in seconds, is given back."""
        front = self.front
        front.drain()
        await asyncio.sleep(limit)
        if front.engine.engine.has_unfinished():
            front.give_back()
            await asyncio.sleep(_DRAIN_LIMIT)
        if self.front is front and self.process.is_alive:
            self.die()


class VirtualFront:
    """In place of the EngineSupervisor: the same calls for the servicer."""

    def __init__(self, executor: VirtualExecutor) -> None:
        self.traffic = LinkTraffic()
        self.info = executor_pb2.GetExecutorInfoResponse()
        self._executor = executor
        self._ports: dict[int, Any] = {}
        self._windows: dict[int, FrameWindow] = {}
        self._next_link = 1
        self._is_ready = asyncio.Event()
        self.is_draining = False
        self.start_engine()

    def start_engine(self) -> None:
        """Start another engine."""
        self.engine = VirtualEngine(self, self._executor)
        self._is_ready.set()

    async def kill_engine(self, seconds: float) -> None:
        """The engine dies; another one is there after some seconds, unless the front died, too."""
        self.engine.end()
        self._is_ready.clear()
        for link in tuple(self._ports):
            self._forget(link).on_end(StatusError.unavailable("the engine process died", retry_after=1.0))
        await asyncio.sleep(seconds)
        if self._executor.process.is_alive and not self._is_ready.is_set():
            self.start_engine()

    async def open_link(self, hello: bytes, port: Any) -> int:
        """See EngineSupervisor."""
        try:
            async with asyncio.timeout(_START_LIMIT):
                await self._is_ready.wait()
        except TimeoutError:
            raise StatusError.unavailable("the engine is starting", retry_after=1.0) from None
        number = self._next_link
        self._next_link += 1
        self._ports[number], self._windows[number] = port, FrameWindow()
        self.engine.deliver(Message(Kind.OPEN, number, hello))
        return number

    def send_frame(self, link: int, frame: bytes) -> None:
        """See EngineSupervisor."""
        if link in self._ports:
            self._windows[link].take(frame)
            self.engine.deliver(Message(Kind.FRAME, link, frame))

    async def wait_for_room(self, link: int) -> None:
        """See EngineSupervisor."""
        if (window := self._windows.get(link)) is not None:
            await window.wait()

    def close_link(self, link: int) -> None:
        """See EngineSupervisor."""
        if link in self._ports:
            self._forget(link)
            self.engine.deliver(Message(Kind.CLOSE, link))

    def _forget(self, link: int) -> Any:
        self._windows.pop(link).close()
        return self._ports.pop(link)

    def drain(self) -> None:
        """Take no new requests."""
        self.is_draining = True
        self.engine.deliver(Message(Kind.DRAIN))

    def give_back(self) -> None:
        """End what is left, to go on elsewhere."""
        self.engine.deliver(Message(Kind.GIVE_BACK))

    def on_message(self, message: Message) -> None:
        """The engine sent something."""
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
            self._forget(message.link)
            port.on_end(StatusError.from_link(link_pb2.LinkStatus.FromString(message.payload)))
        elif message.kind is Kind.TAKEN:
            self._windows[message.link].give(int(message.payload))


class VirtualEngine:
    """An engine process: an EngineLoop that takes a turn when something came and, with work, one after the other.

    A turn is computed when it begins. Its clock then says how long its step took: what the step emitted is sent, and
    the next turn begins, when that time has passed.
    """

    def __init__(self, front: VirtualFront, executor: VirtualExecutor) -> None:
        self._front = front
        self._executor = executor
        self._watch = executor.watch
        self._loop = asyncio.get_running_loop()
        self._clock = StepClock(self._loop.time)
        self._inbox: deque[Message] = deque()
        self._outbox: list[Message] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False
        self._stopped_until = 0.0
        loaded = executor.load(self._clock)
        self.engine = loaded.engine
        channel: Any = self
        self._turns = EngineLoop(loaded, channel, clock=self._clock)

    def deliver(self, message: Message) -> None:
        """The front sent something."""
        if self._watch is not None:
            self._watch(message, True)
        self._inbox.append(message)
        if self._timer is None and not self._is_over:
            self._timer = self._loop.call_later(0.0, self._turn)

    def stop(self, seconds: float) -> None:
        """Stand still."""
        self._stopped_until = max(self._stopped_until, self._loop.time() + seconds)

    def end(self) -> None:
        """Die."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # What EngineLoop needs of its channel.

    def receive(self, timeout: float) -> Iterator[Message]:
        """Yield the messages that have come."""
        while self._inbox:
            yield self._inbox.popleft()

    def send(self, *messages: Message) -> None:
        """To the front, when the step so far is over."""
        if self._clock.ahead:
            self._outbox += messages
        else:
            self._send_now(messages)

    def _send_now(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if self._watch is not None:
                self._watch(message, False)
            self._front.on_message(message)

    def _turn(self) -> None:
        if self._stands_still(self._turn):
            return
        was_busy = self.engine.has_unfinished() or bool(self._inbox)
        began = time.thread_time()
        self._turns.turn()
        self._executor.cpu_s += time.thread_time() - began
        if was_busy:
            self._timer = self._loop.call_later(self._clock.ahead, self._end_turn)
        else:  # it said its last word before waiting
            self._timer = None

    def _end_turn(self) -> None:
        if self._stands_still(self._end_turn):
            return
        self._clock.ahead = 0.0
        outbox, self._outbox = self._outbox, []
        self._send_now(outbox)
        if not self._is_over:
            self._turn()

    def _stands_still(self, then: Callable[[], None]) -> bool:
        left = self._stopped_until - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, then)
        return left > 0
