"""Clients of the public API: streams, or texts to encode and tokens to decode, in a closed loop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from bench.services.neighbours.h2 import Connection, Stream, connect
from bench.services.neighbours.tally import Tally
from bench.services.neighbours.wire import STAMPED, GenerateRequests, age, decode_request, encode_request
from scalellm.v1 import generation_pb2, tokenizer_pb2

_MOST_CONNECTIONS = 64
# A response has one field, so its first byte is that field's tag.
_DELTA, _FINISHED = (
    generation_pb2.GenerateResponse.DELTA_FIELD_NUMBER << 3 | 2,
    generation_pb2.GenerateResponse.FINISHED_FIELD_NUMBER << 3 | 2,
)


class Clients:
    """Keeps `streams` calls open on up to 64 connections.

    Args:
        address: host:port of the tokenizer service.
        stamped: Whether tokens say when they were sent (the scheduler is simulated).
    """

    def __init__(self, address: str, stamped: bool) -> None:
        self._address = address
        self._stamped = stamped
        self._tally = Tally()
        self._connections: list[Connection] = []
        self._number = 0
        self._running = False

    async def start(self, kind: str, streams: int, prompt_len: int, max_tokens: int = 1, text: bool = False) -> None:
        """Open the connections and send the first calls; `kind` is generate, encode or decode."""
        self._running = True
        self._max_tokens = max_tokens
        self._connections = [await connect(self._address) for _ in range(min(streams, _MOST_CONNECTIONS))]
        if kind == "generate":
            self._requests = GenerateRequests(prompt_len, text=text)
            rng = random.Random(streams)
            for place in range(streams):
                self._generate(place, rng.randint(1, max_tokens))
            return
        encodes = kind == "encode"
        request = encode_request(prompt_len) if encodes else decode_request(prompt_len)
        for place in range(streams):
            self._call_unary("Encode" if encodes else "Decode", request, 0 if encodes else prompt_len, place)

    def take(self) -> dict[str, Any]:
        """Counts since the last call."""
        return self._tally.take()

    async def stop(self) -> None:
        """Drop all connections, and with them all calls."""
        self._running = False
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _open(self, place: int, path: str, on_end: Callable[[], None]) -> Stream:
        stream = self._connections[place % len(self._connections)].call(path)
        stream.on_end = lambda: on_end() if self._running else None
        return stream

    def _generate(self, place: int, max_tokens: int) -> None:
        self._number += 1
        tally, counts, clock = self._tally, self._tally.counts, time.perf_counter
        stamped = self._stamped and place % STAMPED == 0
        sent, last = clock(), 0.0
        is_finished = False

        def on_message(message: bytes) -> None:
            nonlocal last, is_finished
            if message[0] == _DELTA:
                now = clock()
                counts["messages"] += 1
                if last:
                    tally.observe("itl", now - last)
                else:
                    tally.observe("ttft", now - sent)
                last = now
                delta = generation_pb2.GenerateResponse.FromString(message).delta
                counts["tokens"] += delta.num_tokens
                if stamped:
                    tally.observe("latency", age(delta.token_ids[0]))
            elif message[0] == _FINISHED:
                is_finished = True
                tally.observe("request", clock() - sent)

        def on_end() -> None:
            counts["requests" if is_finished else "errors"] += 1
            if is_finished:
                self._generate(place, self._max_tokens)

        stream = self._open(place, "/scalellm.v1.Generation/Generate", on_end)
        stream.on_message = on_message
        stream.send(self._requests.make(self._number, max_tokens, stamps=stamped), last=True)

    def _call_unary(self, method: str, request: bytes, num_tokens: int, place: int) -> None:
        sent = time.perf_counter()
        response = b""

        def on_message(message: bytes) -> None:
            nonlocal response
            response = message

        def on_end() -> None:
            nonlocal num_tokens
            if not response:
                self._tally.counts["errors"] += 1
                return
            num_tokens = num_tokens or len(tokenizer_pb2.EncodeResponse.FromString(response).token_ids)
            self._tally.counts["requests"] += 1
            self._tally.counts["tokens"] += num_tokens
            self._tally.observe("request", time.perf_counter() - sent)
            self._call_unary(method, request, num_tokens, place)

        stream = self._open(place, f"/scalellm.v1.Tokenizer/{method}", on_end)
        stream.on_message = on_message
        stream.send(request, last=True)
