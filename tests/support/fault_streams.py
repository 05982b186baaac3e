"""Streams of every kind under which a fault happens, and what each client saw, piece by piece."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import grpc
import jsonschema

from scalellm.v1 import common_pb2, generation_pb2, generation_pb2_grpc
from service_processes import PATIENCE

_CONNECTIONS = 8
_FIRST_TURNS = 20


@dataclass(frozen=True)
class Piece:
    """One message with tokens, and when it came."""

    at: float
    index: int
    offset: int
    token_ids: tuple[int, ...]


@dataclass
class Stream:
    """One request and what became of it.

    Attributes:
        kind: One of `fault_workload`.
        request: The request as it is sent.
        first_turn: The question and answer that a session has before this request.
        timeout: The client's deadline in seconds.
        cancel_after: Tokens after which the client goes away.
        asks_again: A client that goes away sends the same request again.
        pieces: The history: every message with tokens, as it came.
        pieces_before: The history until the client asked again.
        texts: By sample.
        ends: Ends of samples, told with their last tokens.
        codes: Statuses of the call. Exactly one in the end.
        has_begun: Something came: the request was accepted.
        refusals: Times that it was refused as UNAVAILABLE before that.
        is_resumable: The server keeps the answer, as was asked for: the client goes on with it after a broken call.
        resumes: Times that it tried to.
        reading: Cleared: the client does not read.
    """

    number: int
    kind: str
    request: generation_pb2.GenerateRequest
    first_turn: generation_pb2.GenerateRequest | None = None
    timeout: float | None = None
    cancel_after: int | None = None
    asks_again: bool = False
    pieces: list[Piece] = field(default_factory=list)
    pieces_before: list[Piece] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, generation_pb2.SampleFinished] = field(default_factory=dict)
    num_logprobs: int = 0
    has_begun: bool = False
    refusals: int = 0
    request_id: str = ""
    is_resumable: bool = False
    resumes: int = 0
    finished: generation_pb2.Finished | None = None
    codes: list[grpc.StatusCode] = field(default_factory=list)
    details: str = ""
    ended_at: float = 0.0
    reading: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.reading.set()

    @property
    def code(self) -> grpc.StatusCode | None:
        return self.codes[0] if self.codes else None

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.token_ids) for piece in self.pieces)

    @property
    def was_resumed(self) -> bool:
        """True if the request was taken up again: by a service, or by the client itself."""
        ended = self.finished
        return ended is not None and bool(ended.usage.num_resumed or ended.latency.failover_ns or self.resumes)

    def tokens(self) -> dict[int, list[int]]:
        """By sample; the history is checked on the way: each token once, in order."""
        return self._tokens_of(self.pieces)

    def tokens_before(self) -> dict[int, list[int]]:
        """By sample, those that came before the client asked again, checked alike."""
        return self._tokens_of(self.pieces_before)

    def _tokens_of(self, pieces: Sequence[Piece]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for piece in pieces:
            ids = found.setdefault(piece.index, [])
            assert piece.offset == len(ids), (
                f"stream {self.number} ({self.kind}), sample {piece.index}: token {piece.offset} came where "
                f"{len(ids)} was due; {self._history()}"
            )
            ids.extend(piece.token_ids)
        return found

    def misshapen(self) -> list[str]:
        """Describe the complete texts that do not have the shape that was asked for."""
        asked = self.request.structured_output
        if not asked.WhichOneof("shape") or self.finished is None:
            return []
        ended = [sample.index for sample in self.finished.samples if sample.reason == common_pb2.FINISH_REASON_STOP]
        wrong = [index for index in ended if not _has_shape(asked, self.texts.get(index, ""))]
        return [f"stream {self.number}: sample {index} has another shape: {self.texts[index]!r}" for index in wrong]

    def longest_pause(self, since: float) -> float:
        """Longest time without a message, as far as it lies after `since`; in seconds."""
        ends = [piece.at for piece in self.pieces] + [self.ended_at]
        return max((b - max(a, since) for a, b in pairwise(ends) if b > since), default=0.0)

    async def run(self, channel: grpc.aio.Channel, other: grpc.aio.Channel) -> None:
        """To its end, whatever that is. What was refused before it began is asked again, as clients do.

        Args:
            channel: The client's connection.
            other: Its connection when it asks again after it went away.
        """
        deadline = time.monotonic() + PATIENCE
        code = await self._run_on(channel, deadline)
        if self.asks_again and code is grpc.StatusCode.CANCELLED:
            self.pieces_before, self.pieces, self.cancel_after = self.pieces, [], None
            self.texts, self.ends, self.num_logprobs, self.has_begun = {}, {}, 0, False
            code = await self._run_on(other, deadline)
        self.codes.append(code)
        self.ended_at = time.monotonic()

    async def _run_on(self, channel: grpc.aio.Channel, deadline: float) -> grpc.StatusCode:
        """Send the request until it is accepted, and go on after a broken call if it is kept."""
        stub = generation_pb2_grpc.GenerationStub(channel)
        code = await self._ask(stub)
        while code is grpc.StatusCode.UNAVAILABLE and not self.has_begun and time.monotonic() < deadline:
            self.refusals += 1
            await asyncio.sleep(0.2)
            code = await self._ask(stub)
        while code is grpc.StatusCode.UNAVAILABLE and self.is_resumable and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            self.resumes += 1
            self.finished = None  # the call may have broken between this and its status: it is said again
            code = await self._follow(stub.Resume(self._rest(), timeout=10 * PATIENCE, wait_for_ready=True))
        return code

    def _history(self) -> str:
        """Describe the calls and messages, for who looks for a fault."""
        pieces = [(piece.index, piece.offset, list(piece.token_ids)) for piece in self.pieces]
        return (
            f"request {self.request_id!r}, refused {self.refusals} times, resumed {self.resumes} times, "
            f"{self.code} {self.details!r}, messages by sample, offset and tokens: {pieces}"
        )

    async def _ask(self, stub: generation_pb2_grpc.GenerationStub) -> grpc.StatusCode:
        return await self._follow(
            stub.Generate(self.request, timeout=self.timeout or 10 * PATIENCE, wait_for_ready=True)
        )

    def _rest(self) -> generation_pb2.ResumeRequest:
        tokens = self.tokens()
        counts = [len(tokens.get(index, ())) for index in range(1 + max(tokens, default=-1))]
        return generation_pb2.ResumeRequest(request_id=self.request_id, offsets=counts)

    async def _follow(self, call) -> grpc.StatusCode:
        try:
            async for response in call:
                await self.reading.wait()
                self._take(response)
                if self.cancel_after is not None and self.num_tokens >= self.cancel_after:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            self.details = error.details() or ""
            return error.code()
        except asyncio.CancelledError:
            # What grpc raises in the task whose call was cancelled locally.
            if not call.cancelled() or self.cancel_after is None:
                raise
            return grpc.StatusCode.CANCELLED
        return grpc.StatusCode.OK

    def _take(self, response: generation_pb2.GenerateResponse) -> None:
        assert self.finished is None, f"stream {self.number}: something came after Finished"
        self.has_begun = True
        match response.WhichOneof("event"):
            case "started":
                request_id = response.started.request_id
                assert self.request_id in ("", request_id), f"stream {self.number}: became {request_id} on its way"
                self.request_id, self.is_resumable = request_id, response.started.resumable
            case "delta":
                delta = response.delta
                assert delta.index not in self.ends, f"stream {self.number}: something came after a sample's end"
                if delta.HasField("finished"):
                    self.ends[delta.index] = delta.finished
                if delta.token_ids:
                    self.pieces.append(Piece(time.monotonic(), delta.index, delta.offset, tuple(delta.token_ids)))
                self.texts[delta.index] = self.texts.get(delta.index, "") + delta.text
                self.num_logprobs += len(delta.logprobs.logprobs)
            case "finished":
                self.finished = response.finished


class NoFirstTurnError(AssertionError):
    """A session could not be begun, so that the stream which would go on with it did not run."""


async def _first_turn(stub: generation_pb2_grpc.GenerationStub, stream: Stream) -> None:
    """In a session of its own, until one is saved: a busy machine may take longer than the edge waits for Redis."""
    first, name = stream.first_turn, stream.request.session_id
    assert first is not None
    for attempt in range(_FIRST_TURNS):
        first.session_id = stream.request.session_id = f"{name}-{attempt}"
        with suppress(grpc.aio.AioRpcError):
            async for response in stub.Generate(first, timeout=PATIENCE, wait_for_ready=True):
                if response.finished.session == generation_pb2.SESSION_OUTCOME_SAVED:
                    return
        await asyncio.sleep(0.2)
    raise NoFirstTurnError(f"the first turn of {name} cannot be saved")


def _has_shape(shape: generation_pb2.StructuredOutput, text: str) -> bool:
    if shape.regex:
        return re.fullmatch(shape.regex, text) is not None
    try:
        jsonschema.validate(json.loads(text), json.loads(shape.json_schema))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


class Clients:
    """Clients with some connections to each tokenizer, and the streams on them."""

    def __init__(self, addresses: Sequence[str], connections: int = _CONNECTIONS) -> None:
        # A pool of its own per channel, so that each is a connection and may meet another worker.
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500))
        count = max(connections, len(addresses))
        self._channels = [
            grpc.aio.insecure_channel(addresses[number % len(addresses)], options=options) for number in range(count)
        ]

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def first_turns(self, streams: Sequence[Stream]) -> None:
        """Make the sessions that the streams go on with. Raises NoFirstTurnError."""
        stub = generation_pb2_grpc.GenerationStub(self._channels[0])
        await asyncio.gather(*(_first_turn(stub, stream) for stream in streams if stream.first_turn is not None))

    def start(self, streams: Sequence[Stream], rng: random.Random, within: float = 0.5) -> list[asyncio.Task[None]]:
        """Begin the streams at random moments."""

        async def run(stream: Stream, wait: float) -> None:
            await asyncio.sleep(wait)
            channels = self._channels
            place = stream.number % len(channels)
            await stream.run(channels[place], channels[place - 1])

        return [asyncio.create_task(run(stream, rng.uniform(0, within))) for stream in streams]


def differences(disturbed: Stream, undisturbed: Stream) -> list[str]:
    """Describe what a client saw that it would not have seen without the fault; the status is not compared."""
    found = disturbed.misshapen()
    name = f"stream {disturbed.number} ({disturbed.kind}, {disturbed.code})"
    is_whole = disturbed.code is grpc.StatusCode.OK
    expected, seen = undisturbed.tokens(), disturbed.tokens()
    for index, ids in disturbed.tokens_before().items():
        if ids != expected.get(index, [])[: len(ids)]:
            found.append(f"{name}: tokens of sample {index} differ before it was asked for again")
    for index, ids in seen.items():
        wanted = expected.get(index, [])
        if ids != wanted if is_whole else ids != wanted[: len(ids)]:
            found.append(f"{name}: tokens of sample {index} differ: {len(ids)} came, {len(wanted)} were due")
    if is_whole:
        if seen.keys() != expected.keys():
            found.append(f"{name}: samples {sorted(seen)} came, not {sorted(expected)}")
        if disturbed.texts != undisturbed.texts:
            found.append(f"{name}: texts differ")
        if disturbed.num_logprobs != undisturbed.num_logprobs:
            found.append(f"{name}: {disturbed.num_logprobs} log-probabilities, not {undisturbed.num_logprobs}")
        if disturbed.finished is None or undisturbed.finished is None:
            found.append(f"{name}: OK without Finished")
        else:
            for mine, theirs in zip(disturbed.finished.samples, undisturbed.finished.samples, strict=False):
                if mine != theirs:
                    found.append(f"{name}: ended {mine}, not {theirs}")
                if disturbed.ends.get(mine.index) != mine:
                    found.append(f"{name}: the end of sample {mine.index} was not told with its last tokens")
            mine, theirs = disturbed.finished.usage, undisturbed.finished.usage
            if (mine.prompt_tokens, mine.completion_tokens) != (theirs.prompt_tokens, theirs.completion_tokens):
                found.append(f"{name}: usage {mine} is not {theirs}")
    else:
        for index, text in disturbed.texts.items():
            if not undisturbed.texts.get(index, "").startswith(text):
                found.append(f"{name}: text of sample {index} is no beginning of the undisturbed one")
    if len(disturbed.codes) != 1:
        found.append(f"{name}: {len(disturbed.codes)} statuses")
    return found
