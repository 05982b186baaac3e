"""The answer to one Generate call."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc

from clients.client.credentials import Credentials
from clients.client.errors import ClientError
from scalellm.v1.generation_pb2 import GenerateResponse


class GenerationStream(Iterator[GenerateResponse]):
    """Started, then deltas, then Finished, as they come. Leaving the `with` block early cancels the request.

    Args:
        call: The server-streaming gRPC call.
        address: Whom it calls, for errors.
        credentials: What it was shown, for errors.

    Raises ClientError while iterating when the call ends with a status other than OK.
    """

    def __init__(self, call: Any, address: str, credentials: Credentials) -> None:
        self._call = call
        self._address = address
        self._credentials = credentials

    def __next__(self) -> GenerateResponse:
        try:
            response: GenerateResponse = next(self._call)
        except grpc.RpcError as error:
            raise ClientError.from_rpc(error, self._address, self._credentials) from None
        return response

    def cancel(self) -> None:
        """End the request, down to the executor. Without effect once it is over."""
        self._call.cancel()

    def trailers(self) -> dict[str, str]:
        """The trailing metadata's text values, such as `server-timing`; waits for the end of the call."""
        return {key: value for key, value in self._call.trailing_metadata() or () if isinstance(value, str)}

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
