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
"""Characters of a status' message: it travels in frames beside those of others, and in trailing metadata, thrice."""


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
        """Bad input: `message` says what is wrong with `field` and what the limit is."""
        return cls(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {message}", field=field)

    @classmethod
    def unavailable(cls, message: str, retry_after: float | None = None) -> StatusError:
        """Something the request needs cannot be reached right now."""
        return cls(grpc.StatusCode.UNAVAILABLE, message, retry_after=retry_after)

    @classmethod
    def from_link(cls, status: link_pb2.LinkStatus) -> StatusError:
        """The error that a link's Finish carries."""
        code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
        retry_after = status.retry_after_ns / 1e9 if status.retry_after_ns else None
        return cls(code, status.message, field=status.field, retry_after=retry_after)

    @classmethod
    def from_rpc(
        cls, code: grpc.StatusCode, message: str, trailing_metadata: Iterable[tuple[str, str | bytes]]
    ) -> Self:
        """The error with which a peer ended a call, with its RetryInfo if it gave one."""
        retry_after = None
        for key, value in trailing_metadata:
            if key == rpc_status.GRPC_DETAILS_METADATA_KEY and isinstance(value, bytes):
                retry_after = _retry_after(value)
        return cls(code, message, retry_after=retry_after)

    def to_link(self) -> link_pb2.LinkStatus:
        """The same for a link's Finish."""
        return link_pb2.LinkStatus(
            code=self.code.value[0],
            message=self.message,
            field=self.field,
            retry_after_ns=int((self.retry_after or 0.0) * 1e9),
        )

    def to_rpc_status(self) -> status_pb2.Status:
        """The same as google.rpc.Status, with BadRequest or RetryInfo as details."""
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
        """End a call with this status; its handler returns then. Trailing metadata that was set before stays."""
        status = rpc_status.to_status(self.to_rpc_status())
        metadata = (*(context.trailing_metadata() or ()), *status.trailing_metadata)
        try:
            await context.abort_with_status(status._replace(trailing_metadata=metadata))
        except grpc.aio.AbortError as error:
            # The context keeps it, and gRPC raises it again: with the frames of the handler they would be a cycle.
            error.__traceback__ = None


def _retry_after(status: bytes) -> float | None:
    """Seconds of the RetryInfo in a serialised google.rpc.Status; None where there is none."""
    retry_info = error_details_pb2.RetryInfo()
    try:
        for detail in status_pb2.Status.FromString(status).details:
            if detail.Unpack(retry_info):
                return float(retry_info.retry_delay.ToNanoseconds() / 1e9)
    except DecodeError:  # whatever a peer sends
        pass
    return None


def code_name(code: int) -> str:
    """Name of a google.rpc.Code, such as DEADLINE_EXCEEDED."""
    name: str = _CODES.get(code, grpc.StatusCode.UNKNOWN).name
    return name


_CODES = {code.value[0]: code for code in grpc.StatusCode if code.value[0] in code_pb2.Code.values()}
