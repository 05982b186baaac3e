"""An OpenAI-compatible server that plays scripts: what the load generator is tested against."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.load.http_server import Drop, Reply, port_of, serve_http


@dataclass
class HttpPlay:
    """The script of one request.

    Attributes:
        delay: Seconds before each token.
        drop_after: Tokens after which the connection closes.
        end_after: Tokens after which the stream ends in order, but without [DONE].
        error_after: Tokens after which an error comes as an event.
        status: Anything but 200 is answered with an error in JSON.
        glued: All events leave in one piece, as they do from a server in a hurry.
    """

    delay: float = 0.0
    drop_after: int | None = None
    end_after: int | None = None
    error_after: int | None = None
    status: int = 200
    glued: bool = False


@dataclass
class ScriptedOpenAi:
    """Listens on a port of its own; `play` says what becomes of each request."""

    play: Callable[[dict[str, Any]], HttpPlay] = lambda body: HttpPlay()
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def start(self) -> str:
        self._server = await serve_http(self._handle)
        return f"http://127.0.0.1:{port_of(self._server)}/v1"

    async def stop(self) -> None:
        self._server.close()

    def _handle(self, path: str, content: bytes) -> Reply:
        if path == "/v1/models":
            return Reply(_one({"object": "list", "data": [{"id": "scripted"}]}))
        body = json.loads(content)
        self.requests.append((path, body))
        play = self.play(body)
        if play.status != 200:
            return Reply(_one({"error": {"message": "scripted"}}), status=play.status)
        if not body["stream"]:
            text = " word" * body["max_tokens"]
            is_chat = path.endswith("chat/completions")
            choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            return Reply(_one({"choices": [choice], "usage": _usage(body)}))
        return Reply(self._events(path, body, play), "text/event-stream; charset=utf-8")

    async def _events(self, path: str, body: dict[str, Any], play: HttpPlay):
        is_chat = path.endswith("chat/completions")
        glue = b""
        if is_chat:  # a chat begins with the role alone
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number in range(body["max_tokens"]):
            await asyncio.sleep(play.delay)
            if number == play.drop_after:
                raise Drop
            if number == play.end_after:
                return
            if number == play.error_after:
                yield _event({"error": {"message": "scripted", "code": 500}})
                return
            event = _event(
                {"choices": [{"index": 0, **({"delta": {"content": " word"}} if is_chat else {"text": " word"})}]}
            )
            if play.glued:
                glue += event
            else:
                yield event
        yield glue + _event({"choices": [], "usage": _usage(body)}) + b"data: [DONE]\n\n"


def _usage(body: dict[str, Any]) -> dict[str, Any]:
    texts = [body["prompt"]] if "prompt" in body else [message["content"] for message in body["messages"]]
    prompt_tokens = sum(len(text.split()) for text in texts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": body["max_tokens"],
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def _one(answer: dict[str, Any]):
    yield json.dumps(answer).encode()


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"
