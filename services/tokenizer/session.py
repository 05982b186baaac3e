"""A stored conversation, and its encoding as a Redis hash."""

from __future__ import annotations

import json
import secrets
import struct
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.text.conversation import Continuation, Segment


@dataclass(frozen=True, slots=True)
class Turn:
    """State of the conversation after a turn: its numbers of messages and segments."""

    num_messages: int
    num_segments: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session in a list. Times in seconds since the epoch."""

    session_id: str
    num_turns: int
    num_tokens: int
    created: float
    updated: float
    expires: float
    model: str


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation.

    Attributes:
        messages: Questions and answers.
        segments: The text that the model has read and written so far, with the exact token ids.
        turns: The borders of the turns in both.
        created: Time at which its first turn was stored, seconds since the epoch.
        updated: Time at which its last turn was stored.
        version: Changes with every stored turn and is never used twice, so that a session that was deleted and created
            again differs from the old one. Empty = not stored yet.
        document: Data that the API of its last turn stores with it. The next turn drops it.
        model: Name of the model of its last turn, whose token ids the segments have; empty: not known.
    """

    messages: tuple[Message, ...]
    segments: tuple[Segment, ...]
    turns: tuple[Turn, ...]
    created: float
    updated: float
    version: str = ""
    document: str = ""
    model: str = ""

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, which the next turn begins with."""
        return sum(len(segment.token_ids) for segment in self.segments)

    def add_turn(
        self, new_messages: Sequence[Message], continuation: Continuation, written: Segment, answer: Message
    ) -> Session:
        """Return the session with one more turn.

        Args:
            new_messages: The messages of the question.
            continuation: The text and tokens that the model has read.
            written: The text and tokens that the model has written.
            answer: The message of the answer.
        """
        kept = len(continuation.kept)
        segments = (*continuation.segments, *([written] if written.token_ids else []))
        messages = (*self.messages, *new_messages, answer)
        # If the template rewrote the past, earlier turns have no segments of their own any more.
        turns = [Turn(turn.num_messages, min(turn.num_segments, kept)) for turn in self.turns]
        turns.append(Turn(len(messages), len(segments)))
        return Session(messages, segments, tuple(turns), self.created, time.time(), self.version)

    def first_turns(self, num_turns: int) -> Session:
        """Return a copy that ends after the first turns."""
        last = self.turns[num_turns - 1]
        now = time.time()
        return Session(
            self.messages[: last.num_messages],
            self.segments[: last.num_segments],
            self.turns[:num_turns],
            now,
            now,
            model=self.model,
        )


def new_session() -> Session:
    """Return an empty conversation."""
    now = time.time()
    return Session((), (), (), now, now)


MODEL_FIELD = b"model"
INFO_FIELDS = (b"version", b"num_turns", b"num_tokens", b"created", b"updated", MODEL_FIELD)


def encode_session(session: Session, version: str = "") -> tuple[str, dict[str, str | bytes]]:
    """Return the version, a new one unless it is given, and the fields of the hash to store under it.

    The fields are JSON and packed integers.
    """
    token_ids = array("I", (token_id for segment in session.segments for token_id in segment.token_ids))
    if sys.byteorder == "big":
        token_ids.byteswap()
    version = version or secrets.token_hex(8)
    fields: dict[str, str | bytes] = {
        "version": version,
        "num_turns": str(len(session.turns)),
        "num_tokens": str(len(token_ids)),
        "created": repr(session.created),
        "updated": repr(session.updated),
        "messages": json.dumps([message.stored() for message in session.messages]),
        "turns": json.dumps([(turn.num_messages, turn.num_segments) for turn in session.turns]),
        "segments": json.dumps([(segment.text, len(segment.token_ids)) for segment in session.segments]),
        "token_ids": token_ids.tobytes(),
    }
    if session.model:
        fields["model"] = session.model
    if session.document:
        fields["document"] = session.document
    return version, fields


def decode_session(fields: Mapping[bytes, bytes]) -> Session:
    """Return the session in a hash. Raises ValueError for one that no version of this code wrote."""
    try:
        data = fields[b"token_ids"]
        token_ids = struct.unpack(f"<{len(data) // 4}I", data)
        texts: list[tuple[str, int]] = json.loads(fields[b"segments"])
        ends = list(accumulate((count for _, count in texts), initial=0))
        return Session(
            messages=tuple(map(Message.of_stored, json.loads(fields[b"messages"]))),
            segments=tuple(
                Segment(text, token_ids[start : start + count])
                for (text, count), start in zip(texts, ends, strict=False)
            ),
            turns=tuple(Turn(*pair) for pair in json.loads(fields[b"turns"])),
            created=float(fields[b"created"]),
            updated=float(fields[b"updated"]),
            version=fields[b"version"].decode(),
            document=fields.get(b"document", b"").decode(),
            model=fields.get(MODEL_FIELD, b"").decode(),
        )
    except (AttributeError, KeyError, TypeError, ValueError, struct.error) as error:
        # Without the error's message, which may quote the stored text of users.
        raise ValueError(f"not a session ({type(error).__name__})") from error


def decode_info(session_id: str, values: Sequence[bytes | None], ttl_ms: int) -> SessionInfo | None:
    """Decode the values of INFO_FIELDS; None if they are not those of a live session."""
    _, num_turns, num_tokens, created, updated, model = values
    if num_turns is None or num_tokens is None or created is None or updated is None:
        return None
    return SessionInfo(
        session_id=session_id,
        num_turns=int(num_turns),
        num_tokens=int(num_tokens),
        created=float(created),
        updated=float(updated),
        expires=time.time() + max(0, ttl_ms) / 1e3,
        model=(model or b"").decode(errors="replace"),
    )
