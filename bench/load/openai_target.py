"""Any server with OpenAI's completions and chat completions over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx2 as httpx

from bench.load.records import Ended, Request, RequestError, Tokens
from bench.load.target import TargetInfo

_CONNECT_TIMEOUT = 10.0
_MESSAGE_LEN = 300


class OpenAiTarget:
    """Sends prompts as text to `/completions`, sessions with all their history to `/chat/completions`.

    One connection per request. Such servers do not say how many tokens a message
    carries: each is counted as one until the end, where `usage` says how many they were.

    Args:
        base_url: Up to and with the version, such as http://127.0.0.1:8000/v1.
        model: Sent with each request; None: the first one that the server lists.
        api_key: Sent as a bearer token where given.
        respect_eos: Let answers end where the model ends them. Otherwise `ignore_eos` is sent, which is no part of
            OpenAI's API but known to the servers that people run themselves.
        json_schema: JSON Schema of the answers: sent as `response_format`.
    """

    takes_token_ids = False

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        respect_eos: bool = False,
        json_schema: str | None = None,
    ) -> None:
        self._client = httpx.AsyncClient(
            base_url=base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # Some servers close a connection after an answer, and the next request would meet that moment.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT),
            trust_env=False,
        )
        self._model = model
        self._ignore_eos = not respect_eos
        self._json_schema = json_schema

    async def info(self) -> TargetInfo:
        """Ask for the list of models."""
        try:
            answer = await self._client.get("models", timeout=_CONNECT_TIMEOUT)
        except httpx.HTTPError as error:
            raise _failure(error) from None
        if answer.status_code != httpx.codes.OK:
            raise RequestError(f"http_{answer.status_code}", answer.text[:_MESSAGE_LEN])
        try:
            names = [str(entry["id"]) for entry in answer.json()["data"]]
            self._model = self._model or names[0]
        except (ValueError, LookupError, TypeError):
            raise RequestError("not_openai", f"{answer.url} does not list models") from None
        return TargetInfo(self._model, answer.headers.get("server", ""))

    async def connect(self, num_streams: int) -> None:
        """See Target. Requests that are in flight at once each open a connection."""
        asked = (self._client.get("models", timeout=_CONNECT_TIMEOUT) for _ in range(num_streams))
        await asyncio.gather(*asked, return_exceptions=True)

    async def stream(self, request: Request) -> AsyncGenerator[Tokens | Ended]:
        """See Target."""
        path, body = self._body(request)
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    raise RequestError(f"http_{response.status_code}", response.text[:_MESSAGE_LEN])
                if not request.stream:
                    await response.aread()
                    answer = _parse(response.text)
                    yield Tokens(1, _text_of(answer))
                    yield _account(answer.get("usage"))
                    return
                usage: dict[str, Any] | None = None
                is_complete = False
                async for event in httpx.EventSource(response):
                    if event.data == "[DONE]":
                        is_complete = True
                        continue
                    chunk = _parse(event.data)
                    usage = chunk.get("usage") or usage
                    # Comes last; some servers end their streams with it.
                    is_complete = usage is not None
                    if text := _text_of(chunk):
                        yield Tokens(1, text)
        except httpx.HTTPError as error:
            raise _failure(error) from None
        if not is_complete:
            raise RequestError("dropped", "the stream ended without [DONE] and without usage")
        yield _account(usage)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.output_len,
            "temperature": 0,
            "stream": request.stream,
        }
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        if self._ignore_eos:
            body["ignore_eos"] = True
        if self._json_schema is not None:
            schema = {"name": "answer", "schema": json.loads(self._json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if request.session_id is None:
            return "completions", {**body, "prompt": request.text}
        return "chat/completions", {**body, "messages": request.messages()}


def _parse(text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise RequestError("not_openai", f"no JSON object: {text[:_MESSAGE_LEN]}")
    if "error" in answer:
        raise RequestError("server_error", json.dumps(answer["error"])[:_MESSAGE_LEN])
    return answer


def _text_of(answer: dict[str, Any]) -> str:
    """Text of the first choice: of a completion, of a chat's delta or whole message; thoughts count as well."""
    for choice in answer.get("choices") or ():
        part = choice.get("delta") or choice.get("message") or {}
        thoughts = part.get("reasoning_content") or part.get("reasoning") or ""
        return choice.get("text") or thoughts + (part.get("content") or "")
    return ""


def _account(usage: dict[str, Any] | None) -> Ended:
    if not usage:
        return Ended()
    details = usage.get("prompt_tokens_details") or {}
    return Ended(usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens"))


def _failure(error: httpx.HTTPError) -> RequestError:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return RequestError("unreachable", str(error) or type(error).__name__)
    if isinstance(error, httpx.SSEError):
        return RequestError("not_openai", str(error))
    return RequestError("dropped", f"{type(error).__name__}: {error}")
