"""Tenants on the whole line: what one does cannot be seen, timed, taken or hindered by another."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest

from line import Line, generate, scrape, start_line
from scalellm.services.common.api_keys import Role, key_entry, new_key
from scalellm.v1 import (
    common_pb2,
    generation_pb2,
    sessions_pb2,
    sessions_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from service_processes import PATIENCE, RedisProcess, Spawn, eventually

FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "512", "--fake-preset", "h200-llama-8b")
PROMPT = "What one tenant has asked is nobody else's business. " * 8
COUNTED = {
    *(f"Tokenizer/{method}" for method in ("Encode", "Decode", "ApplyChatTemplate")),
    *(f"Sessions/{method}" for method in ("Get", "List", "Fork", "Delete")),
}
LIMITS = "[tenants.small]\nconcurrent_requests = 1\n[tenants.brief]\ntokens_per_minute = 40\nmin_priority = 0\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, str]:
    keys = {tenant: new_key() for tenant in ("acme", "other", "small", "brief")}
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(LIMITS + "".join(key_entry(key, tenant, Role.USER) for tenant, key in keys.items()))
    return {**keys, "file": str(path)}


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis: RedisProcess, model_dir, keys) -> Line:
    edge = ("--workers", "2", "--api-keys", keys["file"])
    return start_line(module_spawn, module_redis, model_dir("smollm2-135m-instruct"), executors=(FAKE,), tokenizer=edge)


def request(max_tokens: int = 4, prompt: str = PROMPT, **fields) -> generation_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    if "session_id" in fields:
        chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=prompt)])
        return generation_pb2.GenerateRequest(chat=chat, sampling=sampling, **fields)
    return generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling, **fields)


def as_tenant(keys: dict[str, str], tenant: str) -> dict:
    return {"metadata": (("authorization", f"Bearer {keys[tenant]}"),), "timeout": PATIENCE}


async def test_cached_prefixes_are_the_tenants_own(line, keys) -> None:
    async with line.channel() as channel:
        first = await generate(channel, request(), **as_tenant(keys, "acme"))
        again = await generate(channel, request(), **as_tenant(keys, "acme"))
        other = await generate(channel, request(), **as_tenant(keys, "other"))
    assert first.finished.usage.cached_tokens == 0
    assert again.finished.usage.cached_tokens > 0
    assert other.finished.usage.cached_tokens == 0
    assert other.trailers["server-timing"].count("cached") == first.trailers["server-timing"].count("cached")


async def test_users_of_one_tenant_can_be_kept_apart(line, keys) -> None:
    prompt = "A prompt that nobody else has had, long enough to fill some blocks of the cache. " * 4

    async def cached(tenant: str, **fields) -> int:
        sampling = common_pb2.SamplingParams(max_tokens=1)
        asked = generation_pb2.GenerateRequest(prompt=prompt, sampling=sampling, **fields)
        answer = await generate(channel, asked, **as_tenant(keys, tenant))
        return answer.finished.usage.cached_tokens

    async with line.channel() as channel:
        assert await cached("acme", cache_salt="alice") == 0
        assert await cached("acme", cache_salt="alice") > 0
        # Neither another user, nor nobody, nor another tenant's user of that name.
        assert await cached("acme", cache_salt="bob") == 0
        assert await cached("acme") == 0
        assert await cached("other", cache_salt="alice") == 0
        assert await cached("acme") > 0


async def test_anothers_session_is_as_one_that_is_not_there(line, keys) -> None:
    async with line.channel() as channel:
        stub = sessions_pb2_grpc.SessionsStub(channel)
        own, stranger = as_tenant(keys, "acme"), as_tenant(keys, "other")
        assert (await generate(channel, request(session_id="s"), **own)).finished.session
        calls = (
            (stub.Get, lambda name: sessions_pb2.GetSessionRequest(session_id=name)),
            (stub.Fork, lambda name: sessions_pb2.ForkSessionRequest(session_id=name, new_session_id="copy")),
            (stub.Delete, lambda name: sessions_pb2.DeleteSessionRequest(session_id=name)),
        )
        for call, make in calls:
            refusals = []
            for name in ("s", "t"):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call(make(name), **stranger)
                refusals.append((error.value.code(), error.value.details().replace(repr(name), "ID")))
            assert refusals[0] == refusals[1]
            assert refusals[0][0] is grpc.StatusCode.NOT_FOUND
        assert not (await stub.List(sessions_pb2.ListSessionsRequest(), **stranger)).sessions
        # Under the same name, each has a conversation of its own, and no cached prefix of the other's.
        theirs = await generate(channel, request(session_id="s"), **stranger)
        assert (theirs.started.session_turns, theirs.finished.usage.cached_tokens) == (0, 0)
        assert (await stub.Get(sessions_pb2.GetSessionRequest(session_id="s"), **own)).session.num_turns == 1
        await stub.Delete(sessions_pb2.DeleteSessionRequest(session_id="s"), **stranger)
        second = await generate(channel, request(session_id="s"), **own)
        assert second.started.session_turns == 1
        assert second.finished.usage.cached_tokens > 0


async def test_equal_request_ids_do_not_meet(line, keys) -> None:
    async with line.channel() as channel:
        tenants = ("acme", "other")
        running = [
            asyncio.create_task(generate(channel, request(400, request_id="same"), **as_tenant(keys, tenant)))
            for tenant in tenants
        ]
        await asyncio.sleep(0.5)
        running[0].cancel()
        answer = await running[1]
        assert (answer.code, answer.finished.usage.completion_tokens) == (grpc.StatusCode.OK, 400)


async def limited_methods(channel: grpc.aio.Channel, **call) -> set[str]:
    """The methods, beside Generate, that are refused for the limit on requests at once."""
    tokenizer, sessions = tokenizer_pb2_grpc.TokenizerStub(channel), sessions_pb2_grpc.SessionsStub(channel)
    requests = {
        tokenizer.Encode: tokenizer_pb2.EncodeRequest(text="Hi"),
        tokenizer.Decode: tokenizer_pb2.DecodeRequest(token_ids=[1]),
        tokenizer.ApplyChatTemplate: tokenizer_pb2.ApplyChatTemplateRequest(chat=request(session_id="s").chat),
        tokenizer.GetInfo: tokenizer_pb2.GetInfoRequest(),
        sessions.Get: sessions_pb2.GetSessionRequest(session_id="s"),
        sessions.List: sessions_pb2.ListSessionsRequest(),
        sessions.Fork: sessions_pb2.ForkSessionRequest(session_id="s", new_session_id="copy"),
        sessions.Delete: sessions_pb2.DeleteSessionRequest(session_id="s"),
    }
    limited = set()
    for method, message in requests.items():
        try:
            await method(message, **call)
        except grpc.aio.AioRpcError as error:
            if error.details().startswith("concurrent_requests: tenant 'small'"):
                limited.add(method._method.decode().rpartition(".")[2])
    return limited


async def test_limits_hold_for_their_tenant_and_name_themselves(line, keys) -> None:
    async with line.channel() as one, line.channel() as two:
        running = asyncio.create_task(generate(one, request(1500, prompt="Hi"), **as_tenant(keys, "small")))
        async with asyncio.timeout(PATIENCE):
            while not (await line.executor_info()).load.running:
                await asyncio.sleep(0.02)
        # Where Redis takes longer than it is waited for, a worker counts alone for a second.
        refused = await generate(two, request(), **as_tenant(keys, "small"))
        while refused.code is grpc.StatusCode.OK and not running.done():
            refused = await generate(two, request(), **as_tenant(keys, "small"))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.details.startswith("concurrent_requests: tenant 'small' may use 1 at once; retry in 1.0 s")
        assert (await generate(two, request(), **as_tenant(keys, "acme"))).code is grpc.StatusCode.OK
        limited, num_limited = set(), 1
        while limited != COUNTED and not running.done():
            now_limited = await limited_methods(two, **as_tenant(keys, "small"))
            limited |= now_limited
            num_limited += len(now_limited)
        assert limited == COUNTED
        assert (await running).code is grpc.StatusCode.OK
        assert (await generate(two, request(60, prompt="Hi"), **as_tenant(keys, "brief"))).code is grpc.StatusCode.OK
        async with asyncio.timeout(PATIENCE):  # what it used is reported beside its path, and runs dry with time
            while (refused := await generate(one, request(), **as_tenant(keys, "brief"))).code is grpc.StatusCode.OK:
                pass
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.details.startswith("tokens_per_minute: tenant 'brief' may use 40 per minute")
        refused = await generate(one, request(priority=-1), **as_tenant(keys, "brief"))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.details == "priority: must be at least 0 for tenant 'brief', got -1"
    samples = scrape(line.tokenizer)
    assert samples['scalellm_tokenizer_requests_limited_total{limit="concurrent_requests"}'] == num_limited
    assert samples['scalellm_tokenizer_requests_limited_total{limit="tokens_per_minute"}'] == 1
    # Workers say so twice a second; one that waited in vain for Redis tries again after a second.
    await eventually(lambda: scrape(line.tokenizer)["scalellm_tokenizer_unshared_limits"] == 0)


async def test_no_key_no_service(line, keys, tmp_path: Path) -> None:
    async with line.channel() as channel:
        answer = await generate(channel, request(), timeout=PATIENCE)
        assert answer.code is grpc.StatusCode.UNAUTHENTICATED
        assert answer.details == "authorization: is missing; send it as metadata: authorization: Bearer KEY"
    assert json.dumps(keys["acme"]) not in line.tokenizer.log.read_text()
