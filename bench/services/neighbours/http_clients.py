"""Clients of the HTTP API: streamed completions in a closed loop, each on a connection of its own."""

from __future__ import annotations

import asyncio
import random
import re
import time
from typing import Any

from bench.services.neighbours.tally import Tally
from bench.services.neighbours.wire import STAMPED, CompletionRequests, age
from services.common.addresses import split_address

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_TOKEN_IDS = re.compile(rb'"token_ids":\[(\d+)')
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """Sends one request after the other. As HTTP goes, its reader is as cheap as `h2` is.

    What it looks for stands in every event of a completion: a finish_reason that is null (a part of the text), a usage
    (the last event before [DONE]). Each part counts as one token until the usage says how many they were.
    """

    def __init__(self, clients: HttpClients, place: int, first_tokens: int) -> None:
        self._clients = clients
        self._place = place
        self._max_tokens = first_tokens
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clients.count_error()

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if b'"finish_reason":null' in event:
                self._on_text(event)
            elif (usage := _COMPLETION_TOKENS.search(event)) is not None:
                self._clients.tally.counts["tokens"] += int(usage[1]) - self._num_tokens
        if self._rest == _LAST_CHUNK:
            self._clients.tally.observe("request", time.perf_counter() - self._sent)
            self._clients.tally.counts["requests"] += 1
            self._max_tokens = self._clients.max_tokens
            self._send()
        elif not events and b"\r\n\r\n" in self._rest and not self._rest.startswith(b"HTTP/1.1 200 "):
            self._transport.abort()  # a refusal

    def _send(self) -> None:
        self._rest = b""
        self._num_tokens = 0
        self._last = 0.0
        self._sent = time.perf_counter()
        stamps = self._clients.stamped and self._place % STAMPED == 0
        self._transport.write(self._clients.next_request(self._max_tokens, stamps=stamps))

    def _on_text(self, event: bytes) -> None:
        now, tally = time.perf_counter(), self._clients.tally
        tally.counts["messages"] += 1
        tally.counts["tokens"] += 1
        self._num_tokens += 1
        if self._last:
            tally.observe("itl", now - self._last)
        else:
            tally.observe("ttft", now - self._sent)
        self._last = now
        if (stamp := _TOKEN_IDS.search(event)) is not None:
            tally.observe("latency", age(int(stamp[1])))


class HttpClients:
    """Keeps `streams` completions running.

    Args:
        address: host:port of the tokenizer service's HTTP.
        stamped: Whether tokens say when they were sent (the scheduler is simulated).
    """

    def __init__(self, address: str, stamped: bool) -> None:
        self.stamped = stamped
        self.tally = Tally()
        self.max_tokens = 1
        self._address = address
        self._connections: list[_Connection] = []
        self._requests: CompletionRequests
        self._number = 0
        self._running = False

    async def start(self, kind: str, streams: int, prompt_len: int, max_tokens: int = 1, text: bool = False) -> None:
        """Open the connections and send the first requests; `kind` is generate."""
        assert kind == "generate", kind
        self._running = True
        self.max_tokens = max_tokens
        self._requests = CompletionRequests(prompt_len, text=text)
        rng = random.Random(streams)
        for place in range(streams):
            made = _Connection(self, place, rng.randint(1, max_tokens))
            await asyncio.get_running_loop().create_connection(lambda made=made: made, *split_address(self._address))  # type: ignore[misc]
            self._connections.append(made)

    def take(self) -> dict[str, Any]:
        """Counts since the last call."""
        return self.tally.take()

    async def stop(self) -> None:
        """Drop all connections, and with them all requests."""
        self._running = False
        for connection in self._connections:
            connection.close()
        self._connections = []

    def next_request(self, max_tokens: int, *, stamps: bool) -> bytes:
        """One whole HTTP request."""
        self._number += 1
        return self._requests.make(self._number, max_tokens, stamps=stamps)

    def count_error(self) -> None:
        """A connection ended, by itself or because the load is taken away."""
        if self._running:
            self.tally.counts["errors"] += 1
