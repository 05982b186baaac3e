"""A client that knows nothing but server reflection lists, describes and calls every public method."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service_processes import PATIENCE

pytestmark = pytest.mark.asyncio(loop_scope="module")

PUBLIC = ("scalellm.v1.Generation", "scalellm.v1.Tokenizer", "scalellm.v1.Sessions")

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
REQUESTS = {
    "Generate": {
        "chat": CHAT,
        "sessionId": "r1",
        "sampling": {"maxTokens": 4},
        "requestId": "kept",
        "onDisconnect": "ON_DISCONNECT_KEEP",
    },
    "Resume": {"requestId": "kept", "offsets": [2]},
    "Encode": {"text": "Hello"},
    "Decode": {"tokenIds": [19556]},
    "ApplyChatTemplate": {"chat": CHAT},
    "GetInfo": {},
    "Get": {"sessionId": "r1"},
    "List": {"pageSize": 10},
    "Fork": {"sessionId": "r1", "newSessionId": "r2"},
    "Delete": {"sessionId": "r2"},
}


class ReflectionClient:
    """Builds a descriptor pool from what the server says, and calls methods with JSON."""

    def __init__(self, channel) -> None:
        self._channel = channel
        self._stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        self.pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()

    async def _ask(self, **question):
        async for answer in self._stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)])):
            return answer
        raise AssertionError("no answer")

    async def services(self) -> list[str]:
        answer = await self._ask(list_services="")
        return [service.name for service in answer.list_services_response.service]

    async def load(self, **question) -> None:
        answer = await self._ask(**question)
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self._known:
                continue
            self._known.add(file.name)
            for dependency in file.dependency:
                await self.load(file_by_filename=dependency)
            self.pool.Add(file)

    async def call(self, method, request: dict) -> list[dict]:
        message = json_format.ParseDict(request, message_factory.GetMessageClass(method.input_type)())
        path = f"/{method.containing_service.full_name}/{method.name}"
        output = message_factory.GetMessageClass(method.output_type)
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        call = make(path, type(message).SerializeToString, output.FromString)(message, timeout=PATIENCE)
        answers = [answer async for answer in call] if method.server_streaming else [await call]
        return [json_format.MessageToDict(answer) for answer in answers]


async def test_everything_can_be_called(client, scheduler):
    reflection = ReflectionClient(client.channel)
    services = await reflection.services()
    assert {*PUBLIC, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} == set(services)
    answers = {}
    for service in PUBLIC:
        await reflection.load(file_containing_symbol=service)
        for method in reflection.pool.FindServiceByName(service).methods:
            answers[method.name] = await reflection.call(method, REQUESTS[method.name])
    assert set(answers) == set(REQUESTS)
    assert next(iter(answers["Generate"][0])) == "started"
    assert answers["Generate"][-1]["finished"]["session"] == "SESSION_OUTCOME_SAVED"
    assert answers["Resume"][-1] == answers["Generate"][-1]
    assert answers["Encode"] == [{"tokenIds": [19556], "tokens": ["Hello"]}]
    assert answers["Decode"] == [{"text": "Hello"}]
    info = answers["GetInfo"][0]
    assert (info["model"], info["vocabSize"], info["maxModelLen"]) == ("smollm2-135m-instruct", 49152, 2048)
    assert info["limits"]["maxN"] == 16
    assert len(answers["Get"][0]["session"]["messages"]) == 2
    assert "r1" in [session["sessionId"] for session in answers["List"][0]["sessions"]]
    assert answers["Fork"][0]["session"]["numTurns"] == 1
