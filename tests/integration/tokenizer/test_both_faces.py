"""A request behaves the same over gRPC and over HTTP: one table of cases runs over both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
from yarl import URL

from line import scrape
from scalellm.services.common.api_keys import Role, key_entry, new_key
from scalellm.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    link_pb2,
    sessions_pb2,
    sessions_pb2_grpc,
)
from scripted_scheduler import Script, ScriptedScheduler
from service_processes import PATIENCE, ServiceProcess, eventually

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HELLO = "Say something."


@dataclass
class Ended:
    """End of one request, in the same form for gRPC and HTTP."""

    code: str
    text: str = ""
    timing: str = ""
    usage: tuple[int, int] = (0, 0)


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    return {tenant: new_key() for tenant in ("acme", "other", "narrow")}


@pytest.fixture(scope="module")
def secured(shared_scheduler, module_spawn, module_redis, model_dir, keys, tmp_path_factory) -> ServiceProcess:
    folder = tmp_path_factory.mktemp("keys")
    file = folder / "keys.toml"
    entries = "".join(key_entry(key, tenant, Role.USER) for tenant, key in keys.items())
    file.write_text(entries + "[tenants.narrow]\nconcurrent_requests = 1\n[tenants.other]\nweight = 4\n")
    service = module_spawn(
        "tokenizer", "--scheduler", shared_scheduler.address, "--model", str(model_dir("smollm2-135m-instruct")),
        "--workers", "1", "--redis-url", module_redis.url, "--metrics-port", "0", "--api-keys", str(file),
        "--log-requests", "--log-format", "json", "--trace-file", str(folder / "spans.jsonl"),
    )  # fmt: skip
    service.spans = folder / "spans.jsonl"  # type: ignore[attr-defined]
    return service


class Face:
    """Sends the same request by one of the two."""

    def __init__(self, name: str, service: ServiceProcess, keys: dict[str, str]) -> None:
        self.name = name
        self.service = service
        self.keys = keys
        self.channel = grpc.aio.insecure_channel(service.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE))

    async def close(self) -> None:
        await self.channel.close()
        await self.http.close()

    async def ask(self, tenant: str = "acme", timeout: float = PATIENCE, trace: str = TRACE, **fields: Any) -> Ended:
        if self.name == "grpc":
            return await self._by_grpc(tenant, timeout, trace, **fields)
        return await self._by_http(tenant, timeout, trace, **fields)

    def metadata(self, tenant: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.keys[tenant]}"),)

    async def call(self, method: str, path: str, body: Any = None, tenant: str = "acme") -> tuple[int, Any]:
        """Call anything by HTTP, whichever face this is."""
        url = URL(f"http://{self.service.http_address}{path}", encoded=True)
        async with self.http.request(method, url, json=body, headers=dict(self.metadata(tenant))) as response:
            return response.status, await response.json()

    async def _by_grpc(self, tenant: str, timeout: float, trace: str, **fields: Any) -> Ended:
        fields = {"max_tokens": 4, "seed": 7, **fields}
        session, request_id = fields.pop("session_id", None), fields.pop("request_id", None)
        shape = fields.pop("shape", None)
        chat = generation_pb2.Chat(
            messages=[generation_pb2.ChatMessage(role="user", content=HELLO)], content_is_text=True
        )
        request = generation_pb2.GenerateRequest(
            chat=chat,
            sampling=common_pb2.SamplingParams(**fields),
            session_id=session,
            request_id=request_id,
            structured_output=shape and generation_pb2.StructuredOutput(**shape[0]),
        )
        headers = (("authorization", f"Bearer {self.keys[tenant]}"), ("traceparent", trace))
        call = generation_pb2_grpc.GenerationStub(self.channel).Generate(request, timeout=timeout, metadata=headers)
        ended = Ended("OK")
        try:
            async for event in call:
                ended.text += event.delta.text
                if event.HasField("finished"):
                    usage = event.finished.usage
                    ended.usage = (usage.prompt_tokens, usage.completion_tokens)
            ended.timing = dict(await call.trailing_metadata())["server-timing"]
        except grpc.aio.AioRpcError as error:
            ended.code = error.code().name
        return ended

    async def _by_http(self, tenant: str, timeout: float, trace: str, **fields: Any) -> Ended:
        shape = fields.pop("shape", None)
        fields |= shape[1] if shape else {}
        body = {"messages": [{"role": "user", "content": HELLO}], "max_tokens": 4, "seed": 7, **fields}
        headers = {
            "authorization": f"Bearer {self.keys[tenant]}",
            "traceparent": trace,
            "request-timeout-ms": str(int(timeout * 1000)),
        }
        async with self.http.post(
            f"http://{self.service.http_address}/v1/chat/completions", json=body, headers=headers
        ) as response:
            answer = await response.json()
            if response.status != 200:
                return Ended(
                    {400: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 504: "DEADLINE_EXCEEDED"}[response.status]
                )
            usage = (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
            text = answer["choices"][0]["message"]["content"]
            return Ended("OK", text, response.headers["server-timing"], usage)


@pytest_asyncio.fixture(loop_scope="session", params=["grpc", "http"])
async def face(request, secured, scheduler, keys, connect) -> AsyncIterator[Face]:
    probe = connect(secured.address)
    await probe.wait_serving()
    await probe.channel.close()
    made = Face(request.param, secured, keys)
    yield made
    await made.close()


async def test_a_request_is_the_same_for_the_scheduler_and_its_client(face: Face, scheduler: ScriptedScheduler) -> None:
    ended = await face.ask(temperature=0.5, top_p=0.25)
    other = Face({"grpc": "http", "http": "grpc"}[face.name], face.service, face.keys)
    twin = await other.ask(temperature=0.5, top_p=0.25)
    await other.close()
    assert (ended.code, ended.text, ended.usage) == (twin.code, twin.text, twin.usage)
    assert ended.code == "OK"
    for part in ("tokenize;dur=", "queue;dur=", "total;dur=", "ttft;dur=", "cached;desc="):
        assert part in ended.timing
        assert part in twin.timing
    mine, theirs = scheduler.submits
    for submit in (mine, theirs):
        assert submit.traceparent.split("-")[1] == TRACE.split("-")[1]
        assert 0 < submit.time_remaining_ns <= (PATIENCE + 1) * 1e9
    for field in ("handle", "request_id", "traceparent", "time_remaining_ns", "execution_id"):
        mine.ClearField(field)
        theirs.ClearField(field)
    assert mine == theirs


SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
NO_SCHEMA = '{"type": "array", "uniqueItems": true}'


def schema_format(schema: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": json.loads(schema)}}


@pytest.mark.parametrize(
    ("shape", "code"),
    [
        (({"json_schema": SCHEMA}, {"response_format": schema_format(SCHEMA)}), "OK"),
        (({"json_object": {}}, {"response_format": {"type": "json_object"}}), "OK"),
        (({"regex": "a/b+"}, {"structured_outputs": {"regex": "a/b+"}}), "OK"),
        (({"choice": {"texts": ["a", "b"]}}, {"guided_choice": ["a", "b"]}), "OK"),
        (({"lark": 'start: "a"'}, {"structured_outputs": {"grammar": 'start: "a"'}}), "OK"),
        (({"json_schema": NO_SCHEMA}, {"response_format": schema_format(NO_SCHEMA)}), "INVALID_ARGUMENT"),
        (({"regex": "a" * 2**16}, {"guided_regex": "a" * 2**16}), "INVALID_ARGUMENT"),
    ],
)
async def test_shapes_of_answers(face: Face, scheduler: ScriptedScheduler, shape: Any, code: str) -> None:
    """The grammar is the same by either, and one that is refused goes nowhere."""
    other = Face({"grpc": "http", "http": "grpc"}[face.name], face.service, face.keys)
    ends = [(await one.ask(shape=shape)).code for one in (face, other)]
    await other.close()
    assert ends == [code, code]
    if code == "OK":
        mine, theirs = (submit.grammar for submit in scheduler.submits)
        assert mine == theirs
        assert mine.startswith("start: ")
    else:
        assert not scheduler.submits


async def test_tenants_have_salts_and_weights_of_their_own(face: Face, scheduler: ScriptedScheduler) -> None:
    for tenant in ("acme", "acme", "other"):
        await face.ask(tenant)
    first, second, other = (submit.cache_salt for submit in scheduler.submits)
    assert first == second != other
    assert [submit.tenant_weight for submit in scheduler.submits] == [1.0, 1.0, 4.0]


async def test_a_tenant_without_room_is_refused_at_the_edge_and_no_other(
    face: Face, scheduler: ScriptedScheduler
) -> None:
    full = link_pb2.LinkStatus(code=8, message="the admission queue is full", retry_after_ns=10**9)
    scheduler.play = lambda submit: Script(refuse=full, full=3600.0)
    assert [(await face.ask("acme")).code for _ in range(3)] == ["RESOURCE_EXHAUSTED"] * 3
    assert len(scheduler.submits) == 1
    scheduler.play = lambda submit: Script()
    assert (await face.ask("other")).code == "OK"
    scheduler.break_links()
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while (await face.ask("acme")).code != "OK":
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


async def test_a_place_is_held_until_the_request_ends(face: Face, scheduler: ScriptedScheduler) -> None:
    scheduler.play = lambda submit: Script(hold_after=1)
    running = asyncio.create_task(face.ask("narrow", max_tokens=50))
    await eventually(lambda: scheduler.num_running == 1)
    assert (await face.ask("narrow")).code == "RESOURCE_EXHAUSTED"
    assert (await asyncio.gather(face.ask("other", timeout=3.0)))[0].code == "DEADLINE_EXCEEDED"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await eventually(lambda: scheduler.num_running == 0)
    late, left = (abort.reason for abort in scheduler.aborts)
    assert left == link_pb2.ABORT_REASON_CANCELLED
    if face.name == "http":  # gRPC's client counts for itself, and may be the first to cancel
        assert late == link_pb2.ABORT_REASON_DEADLINE
    scheduler.play = lambda submit: Script()
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while (await face.ask("narrow")).code != "OK":
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


async def test_a_session_goes_on_by_the_other_face(face: Face, scheduler: ScriptedScheduler) -> None:
    session = f"from-{face.name}"
    other = Face({"grpc": "http", "http": "grpc"}[face.name], face.service, face.keys)
    assert (await face.ask(session_id=session)).code == "OK"
    assert (await other.ask(session_id=session)).code == "OK"
    await other.close()
    first, second = scheduler.submits
    assert list(second.token_ids[: len(first.token_ids)]) == list(first.token_ids)
    assert len(second.token_ids) > len(first.token_ids) + 4
    assert second.session_id == first.session_id == f"acme:{session}"


async def test_books_and_log_and_trace_tell_it(face: Face, scheduler: ScriptedScheduler) -> None:
    def counts() -> dict[str, float]:
        names = ("accepted_total{", "ended_total{")
        return {
            name.removeprefix("scalellm_tokenizer_requests_").replace(f'transport="{face.name}"', ""): value
            for name, value in scrape(face.service).items()
            if name.startswith(tuple(f"scalellm_tokenizer_requests_{part}" for part in names)) and face.name in name
        }

    before = counts()
    trace = TRACE.replace("0af7651916cd43dd", "1" * 8 + {"grpc": "aaaaaaaa", "http": "bbbbbbbb"}[face.name])
    await face.ask(request_id=f"told-{face.name}", trace=trace)
    await face.ask(request_id=f"refused-{face.name}", top_p=2.0, trace=trace)
    grown = {name: value - before[name] for name, value in counts().items() if value != before[name]}
    assert grown == {
        "accepted_total{}": 2,
        'ended_total{code="OK",outcome="finished",}': 1,
        'ended_total{code="INVALID_ARGUMENT",outcome="rejected",}': 1,
    }
    lines = [
        json.loads(line)
        for line in face.service.log.read_text().splitlines()
        if '"request ended' in line or "request ended" in line
    ]
    told = next(line for line in lines if line.get("request_id") == f"told-{face.name}")
    assert {"code", "e2e_ms", "ttft_ms", "prompt_tokens", "completion_tokens", "executor", "tenant"} <= told.keys()
    refused = next(line for line in lines if line.get("request_id") == f"refused-{face.name}")
    assert (refused["code"], refused["field"]) == ("INVALID_ARGUMENT", "sampling.top_p")

    def spans() -> list[str]:
        return [line for line in face.service.spans.read_text().splitlines() if trace.split("-")[1] in line]  # type: ignore[attr-defined]

    await eventually(lambda: len(spans()) >= 1 and "tokenize" in "".join(spans()))


async def test_sessions_are_the_same_by_either_and_nobody_elses(face: Face, scheduler: ScriptedScheduler) -> None:
    """Each face lists, reads, copies and deletes what the other one stored; refusals have the same codes."""
    name = f"kept-by-{face.name}"
    await face.ask(session_id=name)
    await face.ask(session_id=name)
    sessions, metadata = sessions_pb2_grpc.SessionsStub(face.channel), face.metadata("acme")

    by_grpc = (await sessions.Get(sessions_pb2.GetSessionRequest(session_id=name), metadata=metadata)).session
    status, by_http = await face.call("GET", f"/v1/sessions/{name}")
    assert status == 200
    assert [(one["role"], one["content"]) for one in by_http["messages"]] == [
        (one.role, one.content) for one in by_grpc.messages
    ]
    assert (by_http["num_turns"], by_http["num_tokens"], by_http["turn_ends"]) == (2, by_grpc.num_tokens, [2, 4])
    assert abs(by_http["expires_at"] - by_grpc.expire_time.ToNanoseconds() / 1e9) < 120
    status, page = await face.call("GET", f"/v1/sessions/{name}?page_size=3")
    assert (len(page["messages"]), bool(page["next_page_token"])) == (3, True)
    _, rest = await face.call("GET", f"/v1/sessions/{name}?page_token={page['next_page_token']}")
    assert page["messages"] + rest["messages"] == by_http["messages"]

    status, copy = await face.call("POST", f"/v1/sessions/{name}/fork", {"new_session_id": f"{name}-2", "num_turns": 1})
    assert (status, copy["num_turns"], copy["turn_ends"]) == (200, 1, [2])
    listed = await sessions.List(sessions_pb2.ListSessionsRequest(), metadata=metadata)
    _, told = await face.call("GET", "/v1/sessions")
    assert {one["id"] for one in told["data"]} == {one.session_id for one in listed.sessions} >= {name, f"{name}-2"}
    _, foreign = await face.call("GET", "/v1/sessions", tenant="other")
    assert foreign["data"] == []

    for method, path, body, status in (
        ("GET", f"/v1/sessions/{name}", None, 404),
        ("DELETE", f"/v1/sessions/{name}", None, 404),
        ("POST", f"/v1/sessions/{name}/fork", {"new_session_id": "mine"}, 404),
    ):
        assert (await face.call(method, path, body, tenant="other"))[0] == status, (method, "another tenant's")
    for method, path, body, refusal in (
        ("POST", f"/v1/sessions/{name}/fork", {"new_session_id": f"{name}-2"}, (409, None)),
        ("POST", f"/v1/sessions/{name}/fork", {"new_session_id": f"{name}-3", "num_turns": 3}, (400, "num_turns")),
        ("POST", f"/v1/sessions/{name}/fork", {}, (400, "new_session_id")),
        ("POST", f"/v1/sessions/{name}/fork", {"new_session_id": "a b"}, (400, "new_session_id")),
        ("GET", f"/v1/sessions/{name}?page_token=x", None, (400, "page_token")),
        ("GET", "/v1/sessions?page_size=0", None, (400, "page_size")),
        ("GET", "/v1/sessions?page_size=-1", None, (400, "page_size")),
        ("GET", "/v1/sessions/a%20b", None, (400, "session_id")),
    ):
        status, answer = await face.call(method, path, body)
        assert (status, answer["error"]["param"]) == (refusal[0], refusal[1] or answer["error"]["param"]), (path, body)

    for gone in (name, f"{name}-2"):
        assert (await face.call("DELETE", f"/v1/sessions/{gone}"))[1] == {
            "id": gone,
            "object": "session",
            "deleted": True,
        }
        with pytest.raises(grpc.aio.AioRpcError, match="there is no session"):
            await sessions.Get(sessions_pb2.GetSessionRequest(session_id=gone), metadata=metadata)


async def test_a_chat_tells_what_became_of_its_turn(face: Face, scheduler: ScriptedScheduler) -> None:
    body = {"messages": [{"role": "user", "content": HELLO}], "max_tokens": 2, "session_id": f"told-{face.name}"}
    assert (await face.call("POST", "/v1/chat/completions", body))[1]["session"] == "saved"
    del body["session_id"]
    assert "session" not in (await face.call("POST", "/v1/chat/completions", body))[1]
