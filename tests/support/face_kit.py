"""The HTTP face without a service around it: what stands around its requests, for tests of routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from scalellm.services.common.access import Access
from scalellm.services.tokenizer.call_bytes import CallBytes
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.services.tokenizer.http.build import make_application
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.services.tokenizer.rpc import CallGate


def make_face(access: Access | None = None, **more: Any) -> HttpFace:
    edge: Any = SimpleNamespace(access=access or Access(), limits=RequestLimits(), **more.pop("edge", {}))
    return HttpFace(edge, CallGate(), CallBytes(), more.pop("on_end", lambda method, code: None), **more)


def make_all_routes(settings: TokenizerSettings, access: Access | None = None) -> web.Application:
    """All routes and pages, in front of an edge that has the name of a model and nothing else."""
    edge = {"models": SimpleNamespace(names=["m"]), "prompts": None, "schedulers": None}
    return make_application(make_face(access, edge=edge), settings, lambda: True)


@asynccontextmanager
async def calling(app: web.Application) -> AsyncIterator[TestClient[Any, Any]]:
    server = TestServer(app)
    await server.start_server(auto_decompress=False)  # as the listener has it
    async with TestClient(server) as client:
        yield client
