"""A client that knows nothing but server reflection lists, describes and calls every public method."""

from __future__ import annotations

import pytest

from reflection_client import ReflectionClient

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
    "Cancel": {"requestId": "kept"},
    "Encode": {"text": "Hello"},
    "Decode": {"tokenIds": [19556]},
    "ApplyChatTemplate": {"chat": CHAT},
    "GetInfo": {},
    "Get": {"sessionId": "r1"},
    "List": {"pageSize": 1000},
    "Fork": {"sessionId": "r1", "newSessionId": "r2"},
    "Delete": {"sessionId": "r2"},
}


OTHERS = ("grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_every_service_is_listed_and_described(client, version):
    reflection = ReflectionClient(client.channel, version)
    services = await reflection.services()
    assert set(services) == {*PUBLIC, *OTHERS}
    for service in services:
        await reflection.load(file_containing_symbol=service)
        methods = reflection.pool.FindServiceByName(service).methods
        assert all(method.input_type.full_name for method in methods)
        assert methods


async def test_everything_can_be_called(client, scheduler):
    reflection = ReflectionClient(client.channel, "v1")
    answers = {}
    for service in PUBLIC:
        await reflection.load(file_containing_symbol=service)
        for method in reflection.pool.FindServiceByName(service).methods:
            answers[method.name] = await reflection.call(method, REQUESTS[method.name])
    assert set(answers) == set(REQUESTS)
    assert next(iter(answers["Generate"][0])) == "started"
    assert answers["Generate"][-1]["finished"]["session"] == "SESSION_OUTCOME_SAVED"
    assert answers["Resume"][-1] == answers["Generate"][-1]
    assert answers["Cancel"] == [{}]
    assert answers["Encode"] == [{"tokenIds": [19556], "tokens": ["Hello"]}]
    assert answers["Decode"] == [{"text": "Hello"}]
    info = answers["GetInfo"][0]
    assert (info["model"], info["vocabSize"], info["maxModelLen"]) == ("smollm2-135m-instruct", 49152, 2048)
    assert info["limits"]["maxN"] == 16
    assert len(answers["Get"][0]["session"]["messages"]) == 2
    assert "r1" in [session["sessionId"] for session in answers["List"][0]["sessions"]]
    assert answers["Fork"][0]["session"]["numTurns"] == 1
