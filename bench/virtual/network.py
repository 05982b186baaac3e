"""A network between simulated processes: gRPC's bidirectional calls, in order and with a latency, that can be cut.

`VirtualDialer` takes the place of LinkDialer, so a link's real client and server run on both ends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_status import rpc_status

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import LinkDialer

_WINDOW = 16
"""Messages of a reader that does not read which the transport takes before the writer waits."""

Metadata = Sequence[tuple[str, str | bytes]]

Handler = Callable[[AsyncIterator[bytes], "ServerEnd"], Awaitable[None]]


class VirtualProcess:
    """A process that dies or hangs as one. A dead one sends nothing; one that hangs reads and writes later."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.connections: dict[Connection, None] = {}

    def die(self) -> None:
        """Die as by kill -9: what was on the way arrives, then the connections break."""
        self.is_alive = False
        for connection in tuple(self.connections):
            connection.reset()


class Network:
    """Addresses, who serves there, and what gets through.

    Args:
        latency: Seconds that the next message takes.
    """

    def __init__(self, latency: Callable[[], float]) -> None:
        self.latency = latency
        self._servers: dict[str, tuple[VirtualProcess, Handler]] = {}
        self._cut: dict[str, asyncio.Event] = {}
        self.connections: dict[Connection, None] = {}

    def serve(self, address: str, process: VirtualProcess, handler: Handler) -> None:
        """From now on calls to the address go to this handler."""
        self._servers[address] = (process, handler)

    def server(self, address: str) -> tuple[VirtualProcess, Handler] | None:
        """The server at an address; None: connections are refused."""
        found = self._servers.get(address)
        return found if found is not None and found[0].is_alive else None

    def whole(self, address: str) -> asyncio.Event:
        """Set while what is sent to and from an address gets through."""
        if address not in self._cut:
            self._cut[address] = asyncio.Event()
            self._cut[address].set()
        return self._cut[address]

    def cut(self, address: str) -> None:
        """Cut the link: messages wait, and nobody is told."""
        self.whole(address).clear()

    def mend(self, address: str) -> None:
        """Mend the link: waiting messages arrive."""
        self.whole(address).set()


class _Pipe:
    """One direction of a connection: messages arrive in order, each after the latency, or when the wire is mended."""

    def __init__(self, network: Network, address: str) -> None:
        self._whole = network.whole(address)
        self._latency = network.latency
        self._sent: deque[tuple[float, object]] = deque()  # with the times at which they arrive on a whole wire
        self._arrived: deque[object] = deque()
        self._changed = asyncio.Event()
        self._carrier: asyncio.Task[None] | None = None

    def put(self, item: object) -> None:
        """Send something."""
        loop = asyncio.get_running_loop()
        self._sent.append((loop.time() + self._latency(), item))
        if self._carrier is None or self._carrier.done():
            self._carrier = loop.create_task(self._carry())

    async def _carry(self) -> None:
        loop = asyncio.get_running_loop()
        while self._sent:
            due = self._sent[0][0]
            await asyncio.sleep(max(0.0, due - loop.time()))
            await self._whole.wait()
            now = max(due, loop.time())
            while self._sent and self._sent[0][0] <= now:
                self._arrived.append(self._sent.popleft()[1])
            self._wake()

    async def take(self) -> Any:
        """The next thing that has arrived."""
        while not self._arrived:
            self._changed.clear()
            await self._changed.wait()
        item = self._arrived.popleft()
        self._wake()
        return item

    async def has_room(self) -> None:
        """Wait while the reader is far behind."""
        while len(self._sent) + len(self._arrived) > _WINDOW:
            self._changed.clear()
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()


class _End:
    """Ends a direction of a connection, with a status on the way down."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
        self.code, self.details, self.metadata = code, details, metadata


class Connection:
    """One call of a link from a client's process to a server's."""

    def __init__(self, network: Network, address: str, client: VirtualProcess) -> None:
        self.address = address
        self._client = client
        self._network = network
        self._server: VirtualProcess | None = None
        self._up = _Pipe(network, address)
        self._down = _Pipe(network, address)
        self._end: _End | None = None
        self._is_broken = False
        self._is_over = asyncio.Event()
        self.reads_slowly_until = 0.0
        self._serving = asyncio.create_task(self._serve())
        client.connections[self] = None
        network.connections[self] = None

    # The client's end: what LinkClient needs of a grpc.aio call.

    async def write(self, message: bytes) -> None:
        """Send a frame up."""
        if self._end is not None:
            raise asyncio.InvalidStateError("the call has ended")
        if self._client.is_alive:
            self._up.put(message)
            await self._up.has_room()

    async def read(self) -> Any:
        """The next frame; EOF after the last."""
        if self._end is not None:
            return grpc.aio.EOF
        loop = asyncio.get_running_loop()
        if (pause := self.reads_slowly_until - loop.time()) > 0:
            await asyncio.sleep(pause)
        item = await self._down.take()
        if isinstance(item, _End):
            self._end = item
            return grpc.aio.EOF
        return item

    async def code(self) -> grpc.StatusCode:
        """The status code of the call."""
        while self._end is None:
            await self.read()
        return self._end.code

    async def details(self) -> str:
        """The message of the status."""
        await self.code()
        assert self._end is not None
        return self._end.details

    async def trailing_metadata(self) -> Metadata:
        """The rest of its status: RetryInfo."""
        await self.code()
        assert self._end is not None
        return self._end.metadata

    def cancel(self) -> None:
        """The client is done with the call."""
        if self._client.is_alive:
            self._up.put(_End(grpc.StatusCode.CANCELLED, "cancelled by the client"))
        self._end = self._end or _End(grpc.StatusCode.CANCELLED, "cancelled")
        self._client.connections.pop(self, None)

    # The server's end.

    async def _serve(self) -> None:
        await asyncio.sleep(self._network.latency())
        await self._network.whole(self.address).wait()
        found = self._network.server(self.address)
        if found is None:
            self._down.put(_End(grpc.StatusCode.UNAVAILABLE, "connection refused"))
            return
        self._server, handler = found
        self._server.connections[self] = None
        end = ServerEnd(self._server, self._down)
        handling = asyncio.create_task(self._handle(handler, end))
        reading = asyncio.create_task(self._feed(end))
        try:
            await asyncio.wait((handling, reading), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (handling, reading):
                task.cancel()
            await asyncio.gather(handling, reading, return_exceptions=True)
            self._server.connections.pop(self, None)
            self._network.connections.pop(self, None)

    async def _feed(self, end: ServerEnd) -> None:
        while not isinstance(item := await self._up.take(), _End):
            if self._server is not None and self._server.is_alive:
                end.frames.put_nowait(item)

    async def _handle(self, handler: Handler, end: ServerEnd) -> None:
        try:
            await handler(end.iterate(), end)
            status = _End(grpc.StatusCode.OK, "")
        except StatusError as error:
            metadata = rpc_status.to_status(error.to_rpc_status()).trailing_metadata
            status = _End(error.code, error.message, metadata)
        if self._server is not None and self._server.is_alive:
            self._down.put(status)

    def reset(self) -> None:
        """The connection breaks: both ends hear of it, one latency later, or once the wire is mended."""
        if not self._is_broken:
            self._is_broken = True
            self._up.put(_End(grpc.StatusCode.UNAVAILABLE, "connection reset"))
            self._down.put(_End(grpc.StatusCode.UNAVAILABLE, "connection reset"))
            self._client.connections.pop(self, None)


class ServerEnd:
    """The server's end of a link, with the parts of a gRPC context that it needs, and the client's frames."""

    def __init__(self, process: VirtualProcess, down: _Pipe) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._process = process
        self._down = down

    async def iterate(self) -> AsyncIterator[bytes]:
        """The client's frames."""
        while True:
            yield await self.frames.get()

    async def write(self, message: bytes) -> None:
        """Send a frame down; waits while the reader is far behind."""
        if self._process.is_alive:
            self._down.put(message)
            await self._down.has_room()


class VirtualDialer(LinkDialer):
    """Connects one process to others on the network. In place of LinkDialer, whose interface it has."""

    _network: Network
    _process: VirtualProcess

    def __init__(self, network: Network, process: VirtualProcess) -> None:
        super().__init__()
        object.__setattr__(self, "_network", network)
        object.__setattr__(self, "_process", process)

    @asynccontextmanager
    async def open_channel(self, address: str) -> AsyncIterator[Any]:
        """A channel to an address."""
        yield _Channel(self._network, self._process, address)


class _Channel:
    def __init__(self, network: Network, process: VirtualProcess, address: str) -> None:
        self._network, self._process, self._address = network, process, address

    def stream_stream(self, path: str) -> Callable[..., Connection]:
        return lambda metadata=(): Connection(self._network, self._address, self._process)
