"""One error type for every refusal, on public RPCs and on links."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from scalellm.v1 import link_pb2

LONGEST_MESSAGE = 2048
"""Most characters of a status message, which is sent in frames with others, and three times in trailing metadata."""


class StatusError(Exception):
    """A request ends with a status other than OK.

    Args:
        code: The gRPC status code.
        message: One sentence for the client; for bad input it names the field and the limit. What is beyond
            LONGEST_MESSAGE is cut off.
        field: The request's field at fault, for INVALID_ARGUMENT.
        retry_after: Seconds after which a retry may succeed, for RESOURCE_EXHAUSTED and UNAVAILABLE.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, *, field: str = "", retry_after: float | None = None
    ) -> None:
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - 3]}..."
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after = retry_after

    @classmethod
    def invalid(cls, field: str, message: str) -> StatusError:
        """Return an INVALID_ARGUMENT error; message: what is wrong with `field`, and its limit."""
        return cls(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {message}", field=field)

    @classmethod
    def unavailable(cls, message: str, retry_after: float | None = None) -> StatusError:
        """Return an UNAVAILABLE error, for a dependency of the request that cannot be reached now."""
        return cls(grpc.StatusCode.UNAVAILABLE, message, retry_after=retry_after)

    @classmethod
    def from_link(cls, status: link_pb2.LinkStatus) -> StatusError:
        """Convert the status in a link's Finish to an error."""
        code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
        retry_after = status.retry_after_ns / 1e9 if status.retry_after_ns else None
        return cls(code, status.message, field=status.field, retry_after=retry_after)

    @classmethod
    def from_rpc(
        cls, code: grpc.StatusCode, message: str, trailing_metadata: Iterable[tuple[str, str | bytes]]
    ) -> Self:
        """Convert the status with which a peer ended a call, and its RetryInfo if it sent one, to an error."""
        retry_after = None
        for key, value in trailing_metadata:
            if key == rpc_status.GRPC_DETAILS_METADATA_KEY and isinstance(value, bytes):
                retry_after = _retry_after(value)
        return cls(code, message, retry_after=retry_after)

    def to_link(self) -> link_pb2.LinkStatus:
        """Convert the error to the status in a link's Finish."""
        return link_pb2.LinkStatus(
            code=self.code.value[0],
            message=self.message,
            field=self.field,
            retry_after_ns=int((self.retry_after or 0.0) * 1e9),
        )

    def to_rpc_status(self) -> status_pb2.Status:
        """Convert the error to a google.rpc.Status, with BadRequest or RetryInfo as details."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry_after * 1e9))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        return status

    async def end(self, context: grpc.aio.ServicerContext) -> None:
        """End a call with this status, after which its handler must return. Trailing metadata that was set before is
        kept.
        """
        status = rpc_status.to_status(self.to_rpc_status())
        metadata = (*(context.trailing_metadata() or ()), *status.trailing_metadata)
        try:
            await context.abort_with_status(status._replace(trailing_metadata=metadata))
        except grpc.aio.AbortError as error:
            # The context keeps this exception, and gRPC raises it again. With its traceback it would form a reference
            # cycle with the handler's frames.
            error.__traceback__ = None


def _retry_after(status: bytes) -> float | None:
    """Return the seconds of the RetryInfo in a serialised google.rpc.Status; None if it has none."""
    retry_info = error_details_pb2.RetryInfo()
    try:
        for detail in status_pb2.Status.FromString(status).details:
            if detail.Unpack(retry_info):
                return float(retry_info.retry_delay.ToNanoseconds() / 1e9)
    except DecodeError:  # a peer may send anything
        pass
    return None


def code_name(code: int) -> str:
    """Return the name of a google.rpc.Code, such as DEADLINE_EXCEEDED."""
    name: str = _CODES.get(code, grpc.StatusCode.UNKNOWN).name
    return name


_CODES = {code.value[0]: code for code in grpc.StatusCode if code.value[0] in code_pb2.Code.values()}
