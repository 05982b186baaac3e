"""A client of the service's HTTP port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from scalellm.v1 import common_pb2
from scripted_scheduler import Script
from service_processes import PATIENCE


@pytest.fixture(scope="session")
def anthropic() -> ModuleType:
    """Anthropic's package, imported by those who use it alone: that takes four seconds of CPU time, and each process of
    the tests imports all files.
    """
    import anthropic

    return anthropic


@dataclass
class Reply:
    """Response to one request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The documents of a stream; `[DONE]` as it is."""
        blocks = self.body.decode().split("\n\n")
        assert blocks[-1] == "", "the last event is not complete"
        lines = [line for block in blocks[:-1] for line in block.split("\n")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


class HttpClient:
    """Calls one service over connections of its own."""

    def __init__(self, address: str) -> None:
        self.base = f"http://{address}"
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE))

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Send a request; `_` in names of headers stands for `-`. Bytes go as they are, all else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            sent.setdefault("content-type", "application/json")
        async with self.session.request(method, self.base + path, data=data, headers=sent) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, found, await response.read())

    async def post(self, path: str, body: Any, **headers: str) -> Reply:
        return await self.call("POST", path, body, **headers)

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.call("GET", path, **headers)


@pytest_asyncio.fixture(loop_scope="session")
async def http(service, client) -> AsyncIterator[HttpClient]:
    """`client` waits until the service is ready."""
    made = HttpClient(service.http_address)
    yield made
    await made.session.close()


@pytest.fixture
def write(scheduler, tokenizer) -> Callable[..., None]:
    """Let the model write a text; it ends by itself, or is cut off. `chunk`: tokens that come at once."""

    def write(text: str, *, is_cut: bool = False, chunk: int = 1) -> None:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        if is_cut:
            scheduler.play = lambda submit: Script(samples=[tokens], chunk=chunk)
        else:
            tokens.append(tokenizer.token_to_id("<|im_end|>"))
            stop = common_pb2.FINISH_REASON_STOP
            scheduler.play = lambda submit: Script(samples=[tokens], reason=stop, stop_token=True, chunk=chunk)

    return write
