"""The parts around each request: access, drain, headers, web pages, unforeseen errors."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from aiohttp import web

from face_kit import calling, make_all_routes, make_face
from scalellm.services.common.access import ROUTES, Access
from scalellm.services.common.api_keys import Role, key_entry, new_key
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.call_bytes import CallBytes
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.limits import RequestLimits

PUBLIC = {"GET /health", "GET /ping", "GET /", "GET /live", "GET /assets/{name}"}
ADMINS = {"GET /metrics", "GET /v1/fleet"}


async def fine(call: HttpCall, *rest: object) -> web.StreamResponse:
    return web.Response(text="fine")


def concrete(route: str) -> tuple[str, str]:
    method, path = route.split()
    return method, re.sub(r"\{\w+\}", "some-name", path)


async def test_who_may_call_what(tmp_path: Path) -> None:
    user, admin, token = new_key(), new_key(), "t" * 64
    keys, tokens = tmp_path / "keys.toml", tmp_path / "token"
    keys.write_text(key_entry(user, "acme", Role.USER) + key_entry(admin, "ops", Role.ADMIN))
    tokens.write_text(token)
    access = Access(keys, tokens)
    ended: Counter[str] = Counter()
    face = make_face(access, on_end=lambda method, code: ended.update([method]))
    app = face.application()
    for route in (*ROUTES, "GET /not/listed"):
        method, path = route.split()
        face.add(app, method, path, fine)
    async with calling(app) as client:
        for route in (*ROUTES, "GET /not/listed"):

            async def status(call: tuple[str, str] = concrete(route), **headers: str) -> int:
                async with client.request(*call, headers=headers) as response:
                    if response.status == 401:
                        assert response.headers["www-authenticate"] == "Bearer"
                        assert (await response.json())["error"]["code"] == "invalid_api_key"
                    return response.status

            bearer = [await status(Authorization=f"Bearer {secret}") for secret in (new_key(), user, admin, token)]
            found = [await status(), await status(Authorization="Basic abc"), *bearer]
            found += [await status(**{"x-api-key": user}), await status(**{"x-api-key": new_key()})]
            if route in PUBLIC:
                assert found == [200] * 8
            elif route in ADMINS:
                assert found == [401, 401, 401, 403, 200, 403, 403, 401]
            elif route == "GET /not/listed":
                assert found == [401, 401, 401, 403, 403, 403, 403, 401]
            else:
                assert found == [401, 401, 401, 200, 200, 403, 200, 401], route
    num_ordinary = len(ROUTES) - len(PUBLIC) - len(ADMINS)
    assert sum(ended.values()) == 8 * len(PUBLIC) + 3 * num_ordinary + len(ADMINS)
    assert access.num_refused == 8 * (len(ROUTES) + 1) - sum(ended.values())


def test_each_route_has_a_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    settings = TokenizerSettings(metrics_port=0, http_metrics=True)
    app = make_all_routes(settings)
    served = {f"{route.method} {route.resource.canonical}" for route in app.router.routes() if route.method != "HEAD"}
    assert served == set(ROUTES)


async def test_what_is_not_there_is_said_in_json() -> None:
    face = make_face()
    app = face.application()
    face.add(app, "GET", "/health", fine)
    async with calling(app) as client:
        async with client.get("/nothing") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")
        async with client.post("/health") as response:
            assert (response.status, response.headers["allow"]) == (405, "GET,HEAD")
        async with client.get("/health") as response:
            assert response.headers["server"] == "ScaleLLM"


async def test_while_the_worker_drains_calls_are_refused_and_connections_end() -> None:
    face = make_face()
    app = face.application()
    face.add_body(app, "/v1/completions", fine)
    async with calling(app) as client:
        async with client.post("/v1/completions", json={}) as response:
            assert (response.status, response.headers.get("connection")) == (200, None)
        assert await face.gate.drain(1.0) == 0
        async with client.post("/v1/completions", json={}) as response:
            assert response.status == 503
            assert response.headers["retry-after"] == "1"
            assert response.headers["connection"] == "close"


async def test_a_mistake_of_ours_is_told_apart_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    ended = []
    face = make_face(on_end=lambda method, code: ended.append((method, code)))
    app = face.application()

    async def broken(call: HttpCall, *rest: object) -> web.StreamResponse:
        raise RuntimeError("secret")

    async def refusing(call: HttpCall, *rest: object) -> web.StreamResponse:
        raise StatusError.invalid("top_p", "is wrong")

    face.add_body(app, "/broken", broken)
    face.add_body(app, "/refusing", refusing)
    async with calling(app) as client:
        async with client.post("/broken", json={}) as response:
            assert response.status == 500
            assert "secret" not in await response.text()
        async with client.post("/refusing", json={}) as response:
            assert response.status == 400
    assert "secret" in caplog.text
    assert ended == [
        ("POST /broken", grpc.StatusCode.INTERNAL),
        ("POST /refusing", grpc.StatusCode.INVALID_ARGUMENT),
    ]
    assert face.held.num_bytes == 0


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ((), "https://a.example", None),
        (("https://a.example",), "https://a.example", "https://a.example"),
        (("https://a.example",), "https://b.example", None),
        (("*",), "https://b.example", "https://b.example"),
        (("*",), None, None),
    ],
)
async def test_only_pages_of_known_origins_may_call(
    origins: tuple[str, ...], origin: str | None, allowed: str | None
) -> None:
    face = make_face(cors_origins=origins)
    app = face.application()
    face.add_body(app, "/v1/completions", fine)
    asked = {"origin": origin} if origin else {}
    async with calling(app) as client:
        async with client.options(
            "/v1/completions", headers={**asked, "access-control-request-headers": "authorization, x-mine"}
        ) as response:
            assert response.status == (204 if allowed else 405)
            assert response.headers.get("access-control-allow-origin") == allowed
            if allowed:
                assert response.headers["access-control-allow-headers"] == "authorization, x-mine"
        async with client.post("/v1/completions", json={}, headers=asked) as response:
            assert response.headers.get("access-control-allow-origin") == allowed
        # A page that is not allowed to ask can still send a form, which is not taken.
        async with client.post(
            "/v1/completions", data="{}", headers={**asked, "content-type": "text/plain"}
        ) as response:
            assert response.status == 415


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-encoding": "gzip"}, b"{}", 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b"{}", 415),
        ({}, b"x" * (RequestLimits().max_body_bytes + 1), 413),
        ({}, b'{"a": NaN}', 400),
        ({}, b"", 400),
    ],
)
async def test_bodies_are_bounded(headers: dict[str, str], body: bytes, status: int) -> None:
    face = make_face()
    app = face.application()
    face.add_body(app, "/v1/completions", fine)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**18):
            yield body[start : start + 2**18]

    sent = {"content-type": "application/json", **headers}
    async with calling(app) as client:
        for data in (body, chunks()):
            async with client.post("/v1/completions", data=data, headers=sent) as response:
                assert response.status == status
                assert "message" in (await response.json())["error"]
    assert face.held.num_bytes == 0


async def test_a_body_has_to_be_there_in_time() -> None:
    face = make_face()
    face = HttpFace(face.edge, face.gate, CallBytes(read_limit=0.1), face.on_end)
    app = face.application()
    face.add_body(app, "/v1/completions", fine)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    sent = {"content-type": "application/json"}
    async with calling(app) as client, client.post("/v1/completions", data=slow(), headers=sent) as response:
        assert response.status == 408
    assert face.held.num_bytes == 0
