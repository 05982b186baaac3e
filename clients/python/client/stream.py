"""The answer to one call of Generate or Resume, as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

import grpc

from scalellm.client.credentials import Credentials
from scalellm.client.errors import ClientError
from scalellm.client.received import Received
from scalellm.client.reconnection import Reconnection
from scalellm.v1.generation_pb2 import Finished, GenerateResponse, Started


class _Stream:
    """Base of both kinds of streams.

    Args:
        call: The server-streaming gRPC call.
        received: Part of the answer that an earlier call received, if any.
        address: The server's, for errors.
        credentials: Credentials of the connection, for errors.
        reconnection: Rules of going on where the call breaks.
    """

    def __init__(
        self, call: Any, received: Received, address: str, credentials: Credentials, reconnection: Reconnection
    ) -> None:
        self._call = call
        self._received = received
        self._reconnection = reconnection
        self._address = address
        self._credentials = credentials
        self._is_closed = False

    @property
    def started(self) -> Started | None:
        """The first message, with the request's id; None before it came."""
        return self._received.started

    @property
    def finished(self) -> Finished | None:
        """The last message, with finish reasons, usage and latency; None before it came."""
        return self._received.finished

    @property
    def offsets(self) -> tuple[int, ...]:
        """Tokens received of each sample, by index: what `resume` goes on from."""
        return tuple(self._received.offsets)

    def close(self) -> None:
        """End the call, which cancels its request down to the executor, but for one of ON_DISCONNECT_KEEP.

        Without effect once the answer is complete.
        """
        self._is_closed = True
        self._call.cancel()

    def _wait_after(self, error: grpc.RpcError) -> float:
        """Seconds after which the stream goes on by another call. Raises ClientError where it does not."""
        failure = ClientError.from_rpc(error, self._address, self._credentials)
        wait = None if self._is_closed else self._reconnection.wait_after(failure, self._received)
        if wait is None:
            raise failure from None
        return wait

    def _open_again(self, error: grpc.RpcError) -> None:
        """Go on by another call. Raises ClientError if the stream was closed during the wait for it."""
        if self._is_closed:
            raise ClientError.from_rpc(error, self._address, self._credentials) from None
        self._call = self._reconnection.open(self._received)


class GenerationStream(_Stream, Iterator[GenerateResponse]):
    """Iterates over the messages of an answer: Started, then Deltas, then Finished.

    Leaving the `with` block early cancels the request. Iterating raises ClientError when the call ends with a status
    other than OK. An answer that is kept (`started.resumable`) goes on by itself where its connection breaks or its
    server ends: with some tries, until the deadline.
    """

    def __next__(self) -> GenerateResponse:
        while True:
            try:
                response: GenerateResponse = next(self._call)
            except grpc.RpcError as error:
                time.sleep(self._wait_after(error))
                self._open_again(error)
                continue
            if self._received.take(response):
                return response

    def text(self, index: int = 0) -> Iterator[str]:
        """Iterate over the text of one sample, piece by piece. Raises ClientError."""
        for response in self:
            if response.HasField("delta") and response.delta.index == index and response.delta.text:
                yield response.delta.text

    def trailers(self) -> dict[str, str]:
        """Return the trailing metadata's text values, such as `server-timing`; waits for the end of the call."""
        return _texts(self._call.trailing_metadata())

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncGenerationStream(_Stream, AsyncIterator[GenerateResponse]):
    """GenerationStream for asyncio: `async for` and `async with`.

    Cancelling the task that iterates cancels the request as well.
    """

    def __init__(
        self, call: Any, received: Received, address: str, credentials: Credentials, reconnection: Reconnection
    ) -> None:
        super().__init__(call, received, address, credentials, reconnection)
        self._messages = aiter(call)

    async def __anext__(self) -> GenerateResponse:
        while True:
            try:
                response: GenerateResponse = await anext(self._messages)
            except grpc.RpcError as error:
                await asyncio.sleep(self._wait_after(error))
                self._open_again(error)
                self._messages = aiter(self._call)
                continue
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._is_closed or (task is not None and task.cancelling()):
                    raise
                # grpc.aio reports a call that was cancelled here as if the task were.
                raise ClientError(grpc.StatusCode.CANCELLED, "the stream was closed") from None
            if self._received.take(response):
                return response

    async def text(self, index: int = 0) -> AsyncIterator[str]:
        """Iterate over the text of one sample, piece by piece. Raises ClientError."""
        async for response in self:
            if response.HasField("delta") and response.delta.index == index and response.delta.text:
                yield response.delta.text

    async def trailers(self) -> dict[str, str]:
        """Return the trailing metadata's text values, such as `server-timing`; waits for the end of the call."""
        return _texts(await self._call.trailing_metadata())

    async def __aenter__(self) -> AsyncGenerationStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _texts(metadata: Any) -> dict[str, str]:
    return {key: value for key, value in metadata or () if isinstance(value, str)}
