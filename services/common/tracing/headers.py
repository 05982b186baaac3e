"""W3C Trace Context, in the metadata of a call and in a Submit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, Self

_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
LONGEST_STATE = 512
"""Most characters of a tracestate, which the specification requires to be passed on. Longer ones are dropped as a
whole."""


class TraceHeaders(NamedTuple):
    """The two headers; both are empty if there is no trace."""

    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, str | bytes]] | None) -> Self:
        """Read the headers from a call's metadata. Malformed ones are dropped."""
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
        """True if both headers are valid. Malformed ones are dropped if a client sent them, and refused on a link."""
        has_parent = not self.traceparent or _TRACEPARENT.fullmatch(self.traceparent) is not None
        return has_parent and len(self.tracestate) <= LONGEST_STATE and self.tracestate.isascii()

    @property
    def trace_id(self) -> str:
        """Id of the trace, 32 hexadecimal digits; empty if there is no trace."""
        return self.traceparent[3:35]

    @property
    def is_sampled(self) -> bool:
        """True if the caller records its spans, so that this service should as well."""
        return bool(self.traceparent) and bool(int(self.traceparent[-2:], 16) & 1)
