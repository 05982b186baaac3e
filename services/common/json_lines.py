"""Messages between a process and its child, over the child's standard streams: one JSON object per line.

What is told this way stands on no command line, which every user of the machine can read. JSON holds plain values only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

Message = dict[str, Any]


def to_line(message: Mapping[str, Any]) -> bytes:
    """The line of a message, in ASCII."""
    return json.dumps(message).encode("ascii") + b"\n"


def read_line(stream: IO[bytes]) -> Message | None:
    """The next message; None where the stream has ended."""
    line = stream.readline()
    if not line.endswith(b"\n"):  # the writer died over it
        return None
    message: Message = json.loads(line)
    return message


def write_line(stream: IO[bytes], message: Mapping[str, Any]) -> None:
    """Write a message and let it go at once."""
    stream.write(to_line(message))
    stream.flush()
