"""Operations on the sessions of a tenant, for callers of any protocol."""

from __future__ import annotations

from typing import NoReturn

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.limits import MAX_ANSWER_BYTES
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.page_token import bad_page_token, make_page_token, read_page_token
from scalellm.services.tokenizer.session import Session
from scalellm.services.tokenizer.session_store import SessionStore
from scalellm.services.tokenizer.validation import validate_id

DEFAULT_PAGE_SIZE = 100

_PAGE_BYTES = MAX_ANSWER_BYTES - 2**16
"""Most bytes of the messages of a page, which leaves room for the other fields of the answer."""

_MESSAGE_BYTES = 32
"""Most bytes of the tag and the length around a message."""


def message_page(session: Session, page_token: str, page_size: int) -> tuple[tuple[Message, ...], str]:
    """Return a part of a session's messages, at least one, and the token of the next page, empty on the last.

    Args:
        session: Session with the messages.
        page_token: Token of the page; empty: the first page.
        page_size: Most messages of the page. It has fewer if these would not fit into an answer.

    Raises StatusError INVALID_ARGUMENT for a token that is not of this session.
    """
    start = end = _first_of_page(page_token, session)
    room = _PAGE_BYTES
    while end < min(start + page_size, len(session.messages)):
        room -= session.messages[end].to_wire().ByteSize() + _MESSAGE_BYTES
        if room < 0 and end > start:
            break
        end += 1
    token = make_page_token(session.created, end) if end < len(session.messages) else ""
    return session.messages[start:end], token


async def load_session(sessions: SessionStore, session_id: str) -> tuple[Session, float]:
    """Return a session and the seconds until it expires. Raises StatusError."""
    validate_id(session_id, "session_id")
    found = await sessions.load_with_expiry(session_id)
    if found is None:
        _raise_unknown(session_id)
    return found


async def fork_session(sessions: SessionStore, session_id: str, new_session_id: str, num_turns: int | None) -> Session:
    """Store a copy of a session's first turns (None: of all) under a new id, and return it. Raises StatusError."""
    validate_id(new_session_id, "new_session_id")
    session, _ = await load_session(sessions, session_id)
    if num_turns is None:
        num_turns = len(session.turns)
    if not 1 <= num_turns <= len(session.turns):
        raise StatusError.invalid(
            "num_turns", f"must be in [1, {len(session.turns)}], the turns of {session_id!r}, got {num_turns}"
        )
    copy = session.first_turns(num_turns)
    if not await sessions.create(new_session_id, copy):
        raise StatusError(grpc.StatusCode.ALREADY_EXISTS, f"new_session_id: session {new_session_id!r} exists")
    return copy


async def delete_session(sessions: SessionStore, session_id: str) -> None:
    """End a session. Raises StatusError."""
    validate_id(session_id, "session_id")
    if not await sessions.delete(session_id):
        _raise_unknown(session_id)


def _raise_unknown(session_id: str) -> NoReturn:
    raise StatusError(grpc.StatusCode.NOT_FOUND, f"session_id: there is no session {session_id!r}, or it expired")


def _first_of_page(token: str, session: Session) -> int:
    """Return the index of the first message of a page. Raises StatusError INVALID_ARGUMENT."""
    if not token:
        return 0
    created, start = read_page_token(token)
    if type(start) is not int or not 0 <= start <= len(session.messages) or created != session.created:
        raise bad_page_token()  # a malformed token, or one of a session that was deleted and created again
    return start
