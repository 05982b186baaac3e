"""A client that learns everything from server reflection."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2

from service_processes import PATIENCE


class ReflectionClient:
    """Builds a descriptor pool from what the server says, as grpcurl does, and calls methods with JSON."""

    def __init__(self, channel: grpc.aio.Channel, version: str) -> None:
        self._channel = channel
        self._info = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        self.pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()

    async def _ask(self, **question: str) -> reflection_pb2.ServerReflectionResponse:
        call = self._info(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=PATIENCE)
        answers = [answer async for answer in call]
        assert len(answers) == 1
        return answers[0]

    async def services(self) -> list[str]:
        answer = await self._ask(list_services="")
        return [service.name for service in answer.list_services_response.service]

    async def load(self, **question: str) -> None:
        answer = await self._ask(**question)
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self._known:
                continue
            self._known.add(file.name)
            for dependency in file.dependency:
                await self.load(file_by_filename=dependency)
            self.pool.Add(file)

    async def call(self, method: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
        message = json_format.ParseDict(request, message_factory.GetMessageClass(method.input_type)())
        path = f"/{method.containing_service.full_name}/{method.name}"
        output = message_factory.GetMessageClass(method.output_type)
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        call = make(path, type(message).SerializeToString, output.FromString)(message, timeout=PATIENCE)
        answers = [answer async for answer in call] if method.server_streaming else [await call]
        return [json_format.MessageToDict(answer) for answer in answers]
