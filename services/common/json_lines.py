"""Messages between a process and its child, over the child's standard streams: one JSON object per line.

Unlike a command line, these messages cannot be read by other users of the machine. JSON contains plain values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

Message = dict[str, Any]


def to_line(message: Mapping[str, Any]) -> bytes:
    """Encode a message as a line in ASCII."""
    return json.dumps(message).encode("ascii") + b"\n"


def read_line(stream: IO[bytes]) -> Message | None:
    """Read the next message; None at the end of the stream."""
    line = stream.readline()
    if not line.endswith(b"\n"):  # the writer died while writing it
        return None
    message: Message = json.loads(line)
    return message


def write_line(stream: IO[bytes], message: Mapping[str, Any]) -> None:
    """Write a message and flush the stream."""
    stream.write(to_line(message))
    stream.flush()
