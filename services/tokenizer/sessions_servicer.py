"""`scalellm.v1.Sessions`: reads, copies and deletes conversations."""

from __future__ import annotations

import time
from dataclasses import replace

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from scalellm.services.common.access import Access
from scalellm.services.tokenizer.limits import MAX_ANSWER_BYTES, RequestLimits
from scalellm.services.tokenizer.session import Session, SessionInfo
from scalellm.services.tokenizer.session_store import SessionStore
from scalellm.services.tokenizer.stored_sessions import (
    DEFAULT_PAGE_SIZE,
    delete_session,
    fork_session,
    load_session,
    message_page,
)
from scalellm.services.tokenizer.validation import validate_page_size
from scalellm.v1 import sessions_pb2


class SessionsServicer:
    """Serves Get, List, Fork and Delete. Raises StatusError for every outcome but OK.

    Args:
        store: Store of the sessions.
        access: Access control, which tells the tenant.
        ttl: Seconds that a new copy lives.
        limits: Limits on requests.
    """

    def __init__(self, store: SessionStore, access: Access, ttl: float, limits: RequestLimits) -> None:
        self._store = store
        self._access = access
        self._ttl = ttl
        self._limits = limits

    async def Get(
        self, request: sessions_pb2.GetSessionRequest, context: grpc.aio.ServicerContext
    ) -> sessions_pb2.GetSessionResponse:
        """One session with its messages, or with a page of them."""
        sessions = self._sessions()
        page_size = validate_page_size(request, self._limits)
        session, remaining = await load_session(sessions, request.session_id)
        if page_size is None and not request.page_token:
            return sessions_pb2.GetSessionResponse(session=_to_wire(request.session_id, session, remaining))
        messages, token = message_page(session, request.page_token, page_size or DEFAULT_PAGE_SIZE)
        page = replace(session, messages=messages)
        return sessions_pb2.GetSessionResponse(
            session=_to_wire(request.session_id, page, remaining), next_page_token=token
        )

    async def List(
        self, request: sessions_pb2.ListSessionsRequest, context: grpc.aio.ServicerContext
    ) -> sessions_pb2.ListSessionsResponse:
        """A page of sessions, without their messages."""
        sessions = self._sessions()
        page_size = validate_page_size(request, self._limits) or DEFAULT_PAGE_SIZE
        infos, token = await sessions.list(page_size, request.page_token)
        return sessions_pb2.ListSessionsResponse(sessions=map(_info_to_wire, infos), next_page_token=token)

    async def Fork(
        self, request: sessions_pb2.ForkSessionRequest, context: grpc.aio.ServicerContext
    ) -> sessions_pb2.ForkSessionResponse:
        """A copy that goes on separately."""
        num_turns = request.num_turns if request.HasField("num_turns") else None
        copy = await fork_session(self._sessions(), request.session_id, request.new_session_id, num_turns)
        answer = sessions_pb2.ForkSessionResponse(session=_to_wire(request.new_session_id, copy, self._ttl))
        if answer.ByteSize() > MAX_ANSWER_BYTES:
            del answer.session.messages[:]
        return answer

    async def Delete(
        self, request: sessions_pb2.DeleteSessionRequest, context: grpc.aio.ServicerContext
    ) -> sessions_pb2.DeleteSessionResponse:
        """End a session."""
        await delete_session(self._sessions(), request.session_id)
        return sessions_pb2.DeleteSessionResponse()

    def _sessions(self) -> SessionStore:
        return self._store.of(self._access.tenant())


def _to_wire(session_id: str, session: Session, remaining: float) -> sessions_pb2.Session:
    return sessions_pb2.Session(
        session_id=session_id,
        messages=[message.to_wire() for message in session.messages],
        num_turns=len(session.turns),
        num_tokens=session.num_tokens,
        create_time=_timestamp(session.created),
        update_time=_timestamp(session.updated),
        expire_time=_timestamp(time.time() + remaining),
        model=session.model,
    )


def _info_to_wire(info: SessionInfo) -> sessions_pb2.Session:
    return sessions_pb2.Session(
        session_id=info.session_id,
        num_turns=info.num_turns,
        num_tokens=info.num_tokens,
        create_time=_timestamp(info.created),
        update_time=_timestamp(info.updated),
        expire_time=_timestamp(info.expires),
        model=info.model,
    )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMilliseconds(round(seconds * 1e3))
    return timestamp
