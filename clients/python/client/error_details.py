"""The google.rpc details of a status, read without the package that has their classes.

A client needs two of them. Their field numbers are part of gRPC's public error model and cannot change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory
from google.protobuf.message import DecodeError

_TRAILER = "grpc-status-details-bin"

_Field = descriptor_pb2.FieldDescriptorProto


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """Details of a failed call, beside its code and message.

    Attributes:
        field: The request's field at fault; empty: none is named.
        retry_after: Seconds after which a retry may succeed; None: not said.
    """

    field: str = ""
    retry_after: float | None = None


def read_details(code: int, trailers: Any) -> ErrorDetails | None:
    """Return the details in a call's trailing metadata.

    Args:
        code: The call's status code.
        trailers: (key, value) pairs, or None.

    None if there are none, or if they are of another status.
    """
    data = next((value for key, value in trailers or () if key == _TRAILER), None)
    if data is None:
        return None
    field, retry_after = "", None
    try:
        status = _message_class("Status").FromString(data)
        for detail in status.details:
            match detail.type_url.rpartition("/")[2]:
                case "google.rpc.BadRequest":
                    for violation in _message_class("BadRequest").FromString(detail.value).field_violations:
                        field = field or violation.field
                case "google.rpc.RetryInfo":
                    delay = _message_class("RetryInfo").FromString(detail.value).retry_delay
                    retry_after = delay.seconds + delay.nanos / 1e9
    except DecodeError:
        return None
    return ErrorDetails(field, retry_after) if status.code == code else None


def _message_class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"google.rpc.{name}"))


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    """Declare google.rpc.Status, BadRequest and RetryInfo.

    In a pool of its own, as a program may import googleapis-common-protos as well.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name="scalellm/client/error_details.proto",
        package="google.rpc",
        syntax="proto3",
        dependency=["google/protobuf/any.proto", "google/protobuf/duration.proto"],
    )
    one, many = _Field.LABEL_OPTIONAL, _Field.LABEL_REPEATED
    number, text, message = _Field.TYPE_INT32, _Field.TYPE_STRING, _Field.TYPE_MESSAGE
    status = file.message_type.add(name="Status").field
    status.add(name="code", number=1, label=one, type=number)
    status.add(name="details", number=3, label=many, type=message, type_name=".google.protobuf.Any")
    file.message_type.add(name="FieldViolation").field.add(name="field", number=1, label=one, type=text)
    file.message_type.add(name="BadRequest").field.add(
        name="field_violations", number=1, label=many, type=message, type_name=".google.rpc.FieldViolation"
    )
    file.message_type.add(name="RetryInfo").field.add(
        name="retry_delay", number=1, label=one, type=message, type_name=".google.protobuf.Duration"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(duration_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return pool
