"""/v1/sessions: the operations of `scalellm.v1.Sessions`, with the same access rules and limits."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import hdrs, web

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text
from scalellm.services.tokenizer.call_bytes import CallAccount
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.api_request import ApiRequest, UInt32
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.chat_parts import message_json
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.http.service_routes import json_answer
from scalellm.services.tokenizer.http.wire import dump, quote
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.session import Session, SessionInfo
from scalellm.services.tokenizer.stored_sessions import (
    DEFAULT_PAGE_SIZE,
    delete_session,
    fork_session,
    load_session,
    message_page,
)
from scalellm.services.tokenizer.validation import check_page_size

_PATH = "/v1/sessions"
_ONE = f"{_PATH}/{{session_id}}"


class ForkRequest(ApiRequest):
    """The id of a copy, and its number of turns."""

    new_session_id: Any = None
    num_turns: UInt32 | None = None


class SessionsRoutes:
    """Reads, copies and deletes conversations.

    Args:
        edge: The worker.
        ttl: Seconds that a new copy lives.
        is_strict: Refuse fields that are not known.
    """

    def __init__(self, edge: Edge, ttl: float, *, is_strict: bool) -> None:
        self._edge = edge
        self._ttl = ttl
        self._is_strict = is_strict

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the routes."""
        face.add(app, hdrs.METH_GET, _PATH, self.list)
        face.add(app, hdrs.METH_GET, _ONE, self.get)
        face.add(app, hdrs.METH_DELETE, _ONE, self.delete)
        face.add_body(app, f"{_ONE}/fork", self.fork)

    async def list(self, call: HttpCall) -> web.StreamResponse:
        """A page of sessions, without their messages."""
        tenant = self._edge.access.tenant()
        async with self._edge.quotas.admitted(tenant):
            page_size, token = self._page(call)
            infos, token = await self._edge.sessions.of(tenant).list(page_size, token)
        return json_answer({"object": "list", "data": [_info_json(info) for info in infos], "next_page_token": token})

    async def get(self, call: HttpCall) -> web.StreamResponse:
        """One session with a page of its messages."""
        tenant, session_id = self._edge.access.tenant(), call.request.match_info["session_id"]
        async with self._edge.quotas.admitted(tenant):
            page_size, token = self._page(call)
            session, remaining = await load_session(self._edge.sessions.of(tenant), session_id)
            messages, token = message_page(session, token, page_size)
        head = dump(_session_json(session_id, session, remaining))
        written = ",".join(map(_message_json, messages))
        body = f'{head[:-1]},"messages":[{written}],"next_page_token":{quote(token)}}}'
        return web.Response(body=body.encode(), content_type="application/json")

    async def fork(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Store a copy that goes on separately."""
        tenant, session_id = self._edge.access.tenant(), call.request.match_info["session_id"]
        async with self._edge.quotas.admitted(tenant):
            request = ForkRequest.read(body, is_strict=self._is_strict)
            new_session_id = as_text(request.new_session_id, "new_session_id")
            sessions = self._edge.sessions.of(tenant)
            copy = await fork_session(sessions, session_id, new_session_id, request.num_turns)
        return json_answer(_session_json(new_session_id, copy, self._ttl))

    async def delete(self, call: HttpCall) -> web.StreamResponse:
        """End a session."""
        tenant, session_id = self._edge.access.tenant(), call.request.match_info["session_id"]
        async with self._edge.quotas.admitted(tenant):
            await delete_session(self._edge.sessions.of(tenant), session_id)
        return json_answer({"id": session_id, "object": "session", "deleted": True})

    def _page(self, call: HttpCall) -> tuple[int, str]:
        """Return how many entries the page may have, and where it begins. Raises StatusError."""
        query = call.request.query
        page_size = DEFAULT_PAGE_SIZE
        if (text := query.get("page_size", "")) != "":
            if not (text.isascii() and text.isdigit() and len(text) <= 9):
                raise StatusError.invalid("page_size", f"must be a number, got {text[:32]!r}")
            page_size = int(text)
            check_page_size(page_size, self._edge.limits)
        return page_size, query.get("page_token", "")


def _session_json(session_id: str, session: Session, remaining: float) -> dict[str, object]:
    """Return a session without its messages. `turn_ends` has the number of messages up to the end of each turn."""
    info = SessionInfo(
        session_id,
        len(session.turns),
        session.num_tokens,
        session.created,
        session.updated,
        time.time() + remaining,
        session.model,
    )
    return {**_info_json(info), "turn_ends": [turn.num_messages for turn in session.turns]}


def _info_json(info: SessionInfo) -> dict[str, object]:
    return {
        "id": info.session_id,
        "object": "session",
        "model": info.model or None,
        "num_turns": info.num_turns,
        "num_tokens": info.num_tokens,
        "created_at": round(info.created, 3),
        "updated_at": round(info.updated, 3),
        "expires_at": round(info.expires, 3),
    }


def _message_json(message: Message) -> str:
    """A message as /v1/chat/completions takes it."""
    answers = f',"tool_call_id":{quote(message.call_id)}' if message.call_id else ""
    return f'{{"role":{quote(message.role)},"content":{quote(message.content)}{message_json(message)}{answers}}}'
