"""W3C Trace Context as it travels: in the metadata of a call, and in a Submit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, Self

_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
LONGEST_STATE = 512
"""Characters of a tracestate that everybody passes on; longer ones are dropped whole, as the specification allows."""


class TraceHeaders(NamedTuple):
    """The two headers; both empty where there is no trace."""

    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, str | bytes]] | None) -> Self:
        """Read them from a call's metadata. What is not well-formed is not passed on."""
        traceparent = tracestate = ""
        for key, value in metadata or ():
            if key == "traceparent" and isinstance(value, str) and _TRACEPARENT.fullmatch(value):
                traceparent = value
            elif key == "tracestate" and isinstance(value, str):
                tracestate = f"{tracestate},{value}" if tracestate else value
        if not traceparent:
            return cls()
        return cls(traceparent, tracestate if len(tracestate) <= LONGEST_STATE else "")

    @property
    def is_well_formed(self) -> bool:
        """True if both can be read. Ill-formed ones are dropped where a client sent them, and refused on a link."""
        has_parent = not self.traceparent or _TRACEPARENT.fullmatch(self.traceparent) is not None
        return has_parent and len(self.tracestate) <= LONGEST_STATE and self.tracestate.isascii()

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty where there is no trace."""
        return self.traceparent[3:35]

    @property
    def is_sampled(self) -> bool:
        """True if the caller records its spans, and so wants ours."""
        return bool(self.traceparent) and bool(int(self.traceparent[-2:], 16) & 1)
