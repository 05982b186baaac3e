"""`scalellm.v1.Sessions`: reads, copies and deletes conversations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from scalellm.services.common.access import Access
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.limits import MAX_ANSWER_BYTES, RequestLimits
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.page_token import bad_page_token, make_page_token, read_page_token
from scalellm.services.tokenizer.session import Session, SessionInfo
from scalellm.services.tokenizer.session_store import SessionStore
from scalellm.services.tokenizer.validation import validate_id, validate_page_size
from scalellm.v1 import sessions_pb2

_DEFAULT_PAGE_SIZE = 100

_PAGE_BYTES = MAX_ANSWER_BYTES - 2**16
"""Most bytes of the messages of a page: an answer has room for what stands beside them."""

_MESSAGE_BYTES = 32
"""Most bytes of the tag and the length around a message."""


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
        session, remaining = await _load(sessions, request.session_id)
        if page_size is None and not request.page_token:
            return sessions_pb2.GetSessionResponse(session=_to_wire(request.session_id, session, remaining))
        start = _first_of_page(request.page_token, session)
        end = _end_of_page(session.messages, start, page_size or _DEFAULT_PAGE_SIZE)
        token = make_page_token(session.created, end) if end < len(session.messages) else ""
        page = replace(session, messages=session.messages[start:end])
        return sessions_pb2.GetSessionResponse(
            session=_to_wire(request.session_id, page, remaining), next_page_token=token
        )

    async def List(
        self, request: sessions_pb2.ListSessionsRequest, context: grpc.aio.ServicerContext
    ) -> sessions_pb2.ListSessionsResponse:
        """A page of sessions, without their messages."""
        sessions = self._sessions()
        page_size = validate_page_size(request, self._limits) or _DEFAULT_PAGE_SIZE
        infos, token = await sessions.list(page_size, request.page_token)
        return sessions_pb2.ListSessionsResponse(sessions=map(_info_to_wire, infos), next_page_token=token)

    async def Fork(
        self, request: sessions_pb2.ForkSessionRequest, context: grpc.aio.ServicerContext
    ) -> sessions_pb2.ForkSessionResponse:
        """A copy that goes on separately."""
        sessions = self._sessions()
        validate_id(request.new_session_id, "new_session_id")
        session, _ = await _load(sessions, request.session_id)
        num_turns = request.num_turns if request.HasField("num_turns") else len(session.turns)
        if not 1 <= num_turns <= len(session.turns):
            raise StatusError.invalid(
                "num_turns",
                f"must be in [1, {len(session.turns)}], the turns of {request.session_id!r}, got {num_turns}",
            )
        copy = session.first_turns(num_turns)
        answer = sessions_pb2.ForkSessionResponse(session=_to_wire(request.new_session_id, copy, self._ttl))
        if answer.ByteSize() > MAX_ANSWER_BYTES:
            del answer.session.messages[:]
        if not await sessions.create(request.new_session_id, copy):
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS, f"new_session_id: session {request.new_session_id!r} exists"
            )
        return answer

    async def Delete(
        self, request: sessions_pb2.DeleteSessionRequest, context: grpc.aio.ServicerContext
    ) -> sessions_pb2.DeleteSessionResponse:
        """End a session."""
        sessions = self._sessions()
        validate_id(request.session_id, "session_id")
        if not await sessions.delete(request.session_id):
            _raise_unknown(request.session_id)
        return sessions_pb2.DeleteSessionResponse()

    def _sessions(self) -> SessionStore:
        return self._store.of(self._access.tenant())


async def _load(sessions: SessionStore, session_id: str) -> tuple[Session, float]:
    validate_id(session_id, "session_id")
    found = await sessions.load_with_expiry(session_id)
    if found is None:
        _raise_unknown(session_id)
    return found


def _raise_unknown(session_id: str) -> NoReturn:
    raise StatusError(grpc.StatusCode.NOT_FOUND, f"session_id: there is no session {session_id!r}, or it expired")


def _first_of_page(token: str, session: Session) -> int:
    """Number of the message with which a page begins. Raises StatusError INVALID_ARGUMENT."""
    if not token:
        return 0
    created, start = read_page_token(token)
    if type(start) is not int or not 0 <= start <= len(session.messages) or created != session.created:
        raise bad_page_token()  # or of a session that was deleted and begun anew
    return start


def _end_of_page(messages: Sequence[Message], start: int, page_size: int) -> int:
    """Number of the message after the last one of a page, which has at least one message."""
    end, room = start, _PAGE_BYTES
    while end < min(start + page_size, len(messages)):
        room -= messages[end].to_wire().ByteSize() + _MESSAGE_BYTES
        if room < 0 and end > start:
            break
        end += 1
    return end


def _to_wire(session_id: str, session: Session, remaining: float) -> sessions_pb2.Session:
    return sessions_pb2.Session(
        session_id=session_id,
        messages=[message.to_wire() for message in session.messages],
        num_turns=len(session.turns),
        num_tokens=session.num_tokens,
        create_time=_timestamp(session.created),
        update_time=_timestamp(session.updated),
        expire_time=_timestamp(time.time() + remaining),
    )


def _info_to_wire(info: SessionInfo) -> sessions_pb2.Session:
    return sessions_pb2.Session(
        session_id=info.session_id,
        num_turns=info.num_turns,
        num_tokens=info.num_tokens,
        create_time=_timestamp(info.created),
        update_time=_timestamp(info.updated),
        expire_time=_timestamp(info.expires),
    )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMilliseconds(round(seconds * 1e3))
    return timestamp
