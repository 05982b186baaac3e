"""Clients of the public API: streams, or texts to encode and tokens to decode, in a closed loop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from bench.services.neighbours.closed_loop import ClosedLoop
from bench.services.neighbours.h2 import Connection, Stream, connect
from bench.services.neighbours.wire import STAMPED, GenerateRequests, age, decode_request, encode_request
from scalellm.v1 import generation_pb2, tokenizer_pb2

_MOST_CONNECTIONS = 64
# A response has one field, so its first byte is that field's tag.
_DELTA, _FINISHED = (
    generation_pb2.GenerateResponse.DELTA_FIELD_NUMBER << 3 | 2,
    generation_pb2.GenerateResponse.FINISHED_FIELD_NUMBER << 3 | 2,
)


class Clients(ClosedLoop[Connection]):
    """Keeps `streams` calls open on up to 64 connections."""

    async def start(self, kind: str, streams: int, prompt_len: int, max_tokens: int = 1, text: bool = False) -> None:
        """Open the connections and send the first calls; `kind` is generate, encode or decode."""
        self.is_running = True
        self._max_tokens = max_tokens
        self.connections = [await connect(self.address) for _ in range(min(streams, _MOST_CONNECTIONS))]
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

    def _open(self, place: int, path: str, on_end: Callable[[], None]) -> Stream:
        stream = self.connections[place % len(self.connections)].call(path)
        stream.on_end = lambda: on_end() if self.is_running else None
        return stream

    def _generate(self, place: int, max_tokens: int) -> None:
        number = self.next_number()
        tally, counts, clock = self.tally, self.tally.counts, time.perf_counter
        stamped = self.stamped and place % STAMPED == 0
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
        stream.send(self._requests.make(number, max_tokens, stamps=stamped), last=True)

    def _call_unary(self, method: str, request: bytes, num_tokens: int, place: int) -> None:
        sent = time.perf_counter()
        response = b""

        def on_message(message: bytes) -> None:
            nonlocal response
            response = message

        def on_end() -> None:
            nonlocal num_tokens
            if not response:
                self.tally.counts["errors"] += 1
                return
            num_tokens = num_tokens or len(tokenizer_pb2.EncodeResponse.FromString(response).token_ids)
            self.tally.counts["requests"] += 1
            self.tally.counts["tokens"] += num_tokens
            self.tally.observe("request", time.perf_counter() - sent)
            self._call_unary(method, request, num_tokens, place)

        stream = self._open(place, f"/scalellm.v1.Tokenizer/{method}", on_end)
        stream.on_message = on_message
        stream.send(request, last=True)
