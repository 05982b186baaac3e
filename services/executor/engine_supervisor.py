"""Starts the engine process, restarts it when it dies, and passes messages between it and the links."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Protocol

from scalellm.services.common.child_process import ChildProcess, Restarts, describe_exit, python_module
from scalellm.services.common.errors import StatusError
from scalellm.services.common.health import Heartbeat
from scalellm.services.common.lifecycle import StartError
from scalellm.services.common.link import LinkTraffic
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.frame_window import FrameWindow
from scalellm.services.executor.ipc import FrontChannel, Kind, Message
from scalellm.services.executor.nodes.leader import NodeLeader
from scalellm.services.executor.rank_group import RankGroup
from scalellm.services.executor.stall_report import StackFile
from scalellm.v1 import executor_pb2, link_pb2

_log = logging.getLogger(__name__)

_RESTART_DELAY = 0.2
_RETRY_AFTER = 1.0
_LAST_WORDS = 5.0
"""Seconds to wait, once a rank has ended during start-up, for the engine's own error message."""

# Time for one step and the delivery of its results. Requests that hang longer are lost with the link.
_GIVE_BACK_LIMIT = 5.0

# A link to a starting engine waits, because a refused client would come back too late. Shorter than the limit of a
# link's handshake, after which the client would consider the executor dead.
_LINK_PATIENCE = 5.0

# Links that the engine was told of and has not answered, between two steps, although their clients may have left:
# else a client that opens links and leaves would fill the connection to the engine.
_MOST_OPENING = 256


class EngineEnd(enum.Enum):
    """The reason for which an engine process ended and is started again."""

    CRASH = "crash"
    """The engine ended on its own."""
    STALL = "stall"
    """The engine had work, took no step and ended no request for the stall limit, and was ended."""


class LinkPort(Protocol):
    """The receiver of the engine's messages for one link."""

    def on_welcome(self, frame: bytes) -> None:
        """Handle the engine's Welcome, which accepts the link."""

    def on_frame(self, frame: bytes) -> None:
        """Handle a frame of the engine."""

    def on_end(self, error: StatusError) -> None:
        """Handle the end of the link, which the engine refused or lost. It is the last call."""


class EngineSupervisor:
    """The engine process, as its front sees it.

    Args:
        settings: Handed to the engine. With several nodes, those of node 0.
        on_traced: Called with each traced request that ended; None = traces are off.
    """

    def __init__(
        self,
        settings: ExecutorSettings,
        on_traced: Callable[[executor_pb2.TracedRequest], None] | None = None,
    ) -> None:
        self._settings = settings
        self._on_traced = on_traced
        self._ports: dict[int, LinkPort] = {}
        self._windows: dict[int, FrameWindow] = {}
        self._opening: set[int] = set()
        self._next_link = 1
        self._channel: FrontChannel | None = None
        self._process: ChildProcess | None = None
        self._leader = NodeLeader(settings) if settings.nodes > 1 else None
        self._ranks = RankGroup()
        self._heartbeat = Heartbeat(settings.stall_limit_s)
        self._ready = False
        self._draining = False
        self._lost_rank = ""
        self._has_lost_node = False
        self._changed = asyncio.Event()
        self._on_ready: Callable[[], None]
        self.info = executor_pb2.GetExecutorInfoResponse()
        self.traffic = LinkTraffic()
        self.engine_ends = dict.fromkeys(EngineEnd, 0)

    @property
    def has_engine(self) -> bool:
        """True while an engine runs that has loaded its model."""
        return self._ready

    @property
    def is_draining(self) -> bool:
        """True once `drain` was called."""
        return self._draining

    @property
    def is_alive(self) -> bool:
        """True while the engine reports, and its steps advance if it has work."""
        return self._heartbeat.is_alive

    @property
    def num_links(self) -> int:
        """Number of links that are open or being opened."""
        return len(self._ports)

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        return self._process.pid if self._process is not None else None

    @property
    def rank_pids(self) -> Mapping[int, int]:
        """Process ids of the engine's other ranks on this host, by rank."""
        return self._ranks.pids

    @property
    def num_missing_nodes(self) -> int:
        """Number of the executor's other hosts that are not connected. The engine waits for them."""
        return 0 if self._leader is None else self._leader.num_missing

    @property
    def is_ready(self) -> bool:
        """True if new requests are accepted: the model is loaded, the engine is alive, and it does not drain."""
        return self._ready and not self._draining and self._heartbeat.is_alive

    @property
    def num_unfinished(self) -> int:
        """Number of running and waiting requests, by the engine's latest report."""
        return self.info.load.running + self.info.load.waiting if self._ready else 0

    async def open_link(self, hello: bytes, port: LinkPort) -> int:
        """Open a link to the engine, waiting some seconds for one that is starting. Returns the link's number.

        Raises:
            StatusError: UNAVAILABLE, with a time to retry, if the engine is still starting, or opens many links.
        """
        try:
            async with asyncio.timeout(_LINK_PATIENCE):
                while not self._ready or len(self._opening) >= _MOST_OPENING:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            why = f"{_MOST_OPENING} other links are being opened" if self._ready else "the engine is starting"
            raise StatusError.unavailable(why, retry_after=_RETRY_AFTER) from None
        assert self._channel is not None
        number = self._next_link
        self._next_link += 1
        self._ports[number] = port
        self._windows[number] = FrameWindow()
        self._opening.add(number)
        self._channel.send(Message(Kind.OPEN, number, hello))
        return number

    def send_frame(self, link: int, frame: bytes) -> None:
        """Pass a client's frame to the engine. Does nothing once the link has ended."""
        if self._channel is not None and link in self._ports:
            self._windows[link].take(frame)
            self._channel.send(Message(Kind.FRAME, link, frame))

    async def wait_for_room(self, link: int) -> None:
        """Wait until another frame of a link may be passed to the engine, or the link has ended."""
        if (window := self._windows.get(link)) is not None:
            await window.wait()

    def close_link(self, link: int) -> None:
        """Close the link of a client that is gone. The engine cancels its requests."""
        if self._forget(link) is not None and self._channel is not None:
            self._channel.send(Message(Kind.CLOSE, link))

    def _forget(self, link: int) -> LinkPort | None:
        """Forget a link that has ended. Returns its port; None if it had ended before."""
        if (window := self._windows.pop(link, None)) is not None:
            window.close()
        return self._ports.pop(link, None)

    async def drain(self, limit: float) -> int:
        """Refuse new requests, and wait up to `limit` seconds for the open ones. Returns the number that remain."""
        self._draining = True
        if self._channel is not None and self._ready:
            self._channel.send(Message(Kind.DRAIN))
        return await self._until_idle(limit)

    async def give_back(self) -> int:
        """Give all open requests back to their schedulers, which move them. Returns the number that remain."""
        if self._channel is not None and self._ready:
            self._channel.send(Message(Kind.GIVE_BACK))
        return await self._until_idle(_GIVE_BACK_LIMIT)

    async def _until_idle(self, limit: float) -> int:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                # Wait for a report that is newer than the order to drain.
                while self._ready and (self.num_unfinished or not self.info.load.draining):
                    self._changed.clear()
                    await self._changed.wait()
        return self.num_unfinished

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Keep an engine running until cancelled. Raises StartError when it cannot start or keeps dying.

        The engine is ended by killing it, because it holds no state that must outlive it.
        """
        self._on_ready = on_ready
        if self._leader is None:
            await self._keep_running()
            return
        try:
            await self._leader.open()
            await self._keep_running()
        finally:
            await self._leader.close()

    async def _keep_running(self) -> None:
        restarts = Restarts(self._settings.max_engine_restarts, first_delay=_RESTART_DELAY)
        while True:
            if await self._run_once():
                restarts.forget()
            if self._has_lost_node:  # the next start waits without limit until the node is back
                continue
            delay = restarts.crashed()
            if delay is None:
                raise StartError(
                    f"the engine died {restarts.num_crashes} times in a row while starting; its log lines are above"
                )
            await asyncio.sleep(delay)

    async def _run_once(self) -> bool:
        """Start an engine and wait for its end. Returns whether it ever became ready."""
        self._ranks = await RankGroup.start(self._settings, self._leader)
        self._stacks = StackFile()
        why, has_stalled = "node 0 is shutting down, or cannot start", False
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                descriptors = (theirs.fileno(), self._stacks.fileno(), *self._ranks.leader_descriptors)
                self._process = await ChildProcess.start(
                    python_module("scalellm.services.executor.engine_process", *map(str, descriptors)),
                    self._ranks.environment,
                    output=None,
                    pass_fds=descriptors,
                )
            self._ranks.close_sockets()
            self._process.tell(self._settings.model_dump(mode="json"))
            self._channel = FrontChannel(self._on_message)
            await self._channel.open(ours)
            stalls = await self._stalls(self._channel)
            self._has_lost_node = self._ranks.has_lost_node
            if stalls:
                self.engine_ends[EngineEnd.STALL] += 1
                report = await self._stacks.ask(self._process.pid) + await self._ranks.stacks()
                why, has_stalled = f"the engine has taken no step for {self._settings.stall_limit_s:g} s", True
                _log.error("%s and is ended; of its threads:\n%s", why, report)
                return True
            self.engine_ends[EngineEnd.CRASH] += 1
            if self._lost_rank:
                why = self._lost_rank
                _log.error("%s, and its engine is ended: their requests are lost here", self._lost_rank)
                return self._ready
            why = f"the engine process ended with {describe_exit(await self._process.wait())}"
            _log.error("%s, its requests are lost here", why)
            if report := self._stacks.read():
                _log.error("where it was:\n%s", report)
            return self._ready
        finally:
            if self._draining:
                await self._end_process(StatusError.unavailable("the executor is shutting down"))
            else:
                # The time to retry tells the schedulers that this executor is alive and will have an engine again.
                await self._end_process(StatusError.unavailable("the engine process died", retry_after=_RETRY_AFTER))
            await self._ranks.end(why, stalled=has_stalled)

    async def _stalls(self, channel: FrontChannel) -> bool:
        """Wait until the engine or one of its ranks ends, or the engine stalls. Returns True if it stalls.

        Raises:
            StartError: The engine could not start.
        """
        ended, stalled = asyncio.create_task(channel.wait_ended()), asyncio.create_task(self._heartbeat.until_stalled())
        rank_ended = asyncio.create_task(self._ranks.first_end())
        self._lost_rank = ""
        try:
            await asyncio.wait((ended, stalled, rank_ended), return_when=asyncio.FIRST_COMPLETED)
            if rank_ended.done() and not ended.done():
                self._lost_rank = rank_ended.result()
                if not self._ready:  # the engine may be about to report why it could not start
                    await asyncio.wait((ended,), timeout=_LAST_WORDS)
            if ended.done():
                ended.result()
            return not ended.done() and not self._lost_rank
        finally:
            for task in (ended, stalled, rank_ended):
                task.cancel()

    def _on_message(self, message: Message) -> None:
        port = self._ports.get(message.link)
        if message.kind in (Kind.WELCOME, Kind.REFUSE) and message.link in self._opening:
            self._opening.discard(message.link)
            self._changed.set()
        match message.kind:
            case Kind.FRAME:
                if port is not None:
                    port.on_frame(message.payload)
            case Kind.STATS:
                progress = _progress(self.info)
                self.info = executor_pb2.GetExecutorInfoResponse.FromString(message.payload)
                if not self._ready:
                    self._become_ready()
                if _progress(self.info) != progress or not self.num_unfinished:
                    # an idle engine counts as having work, since it must report twice a second
                    self._heartbeat.beat(has_work=True)
                self._changed.set()
            case Kind.WELCOME:
                if port is not None:
                    port.on_welcome(message.payload)
            case Kind.REFUSE:
                if self._forget(message.link) is not None and port is not None:
                    port.on_end(StatusError.from_link(link_pb2.LinkStatus.FromString(message.payload)))
            case Kind.TAKEN:
                if (window := self._windows.get(message.link)) is not None:
                    window.give(int(message.payload))
            case Kind.TRACE:
                if self._on_traced is not None:
                    self._on_traced(executor_pb2.TracedRequest.FromString(message.payload))
            case Kind.PROGRESS:
                _log.info("%s", message.payload.decode())
            case Kind.FATAL:
                raise StartError(message.payload.decode())
            case other:
                raise AssertionError(f"the engine sent {other}")

    def _become_ready(self) -> None:
        self._ready = True
        if self._draining and self._channel is not None:
            self._channel.send(Message(Kind.DRAIN))
        self._on_ready()

    async def _end_process(self, error: StatusError) -> None:
        """Kill the engine process, if there is one, and end all links with an error."""
        self._ready = False
        self._heartbeat.beat(has_work=False)
        self._stacks.close()
        self.info = executor_pb2.GetExecutorInfoResponse()  # the last report is out of date
        self._changed.set()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._opening.clear()
        for link in tuple(self._ports):
            if (port := self._forget(link)) is not None:
                port.on_end(error)
        if self._process is not None:
            await self._process.kill()
        self._process = None


def _progress(info: executor_pb2.GetExecutorInfoResponse) -> tuple[int, ...]:
    """Return what changes as an engine gets on: its steps, and the ends of requests, because one that only compiles
    grammars which turn out to be invalid takes no step.
    """
    return info.steps, info.finished, info.cancelled, info.rejected
