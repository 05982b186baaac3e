"""gRPC server reflection, under both names that tools ask for.

Newer tools ask for `grpc.reflection.v1`, older ones for `grpc.reflection.v1alpha`. The messages are the same;
grpcio-reflection has only the older name.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1ALPHA = "grpc.reflection.v1alpha"
_V1 = "grpc.reflection.v1"

REFLECTION_SERVICES = (f"{_V1ALPHA}.ServerReflection", f"{_V1}.ServerReflection")
"""Full names under which reflection is served."""


def add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Let clients list and describe `services` (full names) and reflection itself."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*services, *REFLECTION_SERVICES))
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = [
        grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})
        for service in REFLECTION_SERVICES
    ]
    server.add_generic_rpc_handlers(handlers)


def _describe_v1() -> None:
    """Add the file of the newer name to protobuf's pool, since tools describe every service that they list."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = file.name.replace("v1alpha", "v1")
    file.package = _V1
    fields = [field for message in file.message_type for field in message.field if field.type_name]
    methods = [method for service in file.service for method in service.method]
    for field in fields:
        field.type_name = field.type_name.replace(f".{_V1ALPHA}.", f".{_V1}.")
    for method in methods:
        method.input_type = method.input_type.replace(f".{_V1ALPHA}.", f".{_V1}.")
        method.output_type = method.output_type.replace(f".{_V1ALPHA}.", f".{_V1}.")
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
