"""How a server opens a link: the first frame within a time limit, and the lease of what the client submits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from scalellm.v1 import link_pb2
from services.common.errors import StatusError
from services.common.link.version import LEASES_SINCE

_HELLO_LIMIT = 10.0


async def first_frame(frames: AsyncIterator[bytes]) -> bytes:
    """Return a new link's first frame. Raises StatusError when there is none, or none in time."""
    try:
        return await asyncio.wait_for(anext(frames), _HELLO_LIMIT)
    except StopAsyncIteration:
        raise StatusError.invalid("hello", "the link was closed before it was opened") from None
    except TimeoutError:
        message = f"hello: none came within {_HELLO_LIMIT:g} s"
        raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None


def lease_of(hello: link_pb2.Hello, lease: float) -> float | None:
    """The lease of a link, in seconds; None for a client of a version that does not renew."""
    return lease if hello.api_minor >= LEASES_SINCE else None
