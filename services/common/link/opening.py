"""The opening of a link at its server: time limit of the first frame, comparison of tokenizers, and the lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link.version import LEASES_SINCE
from scalellm.v1 import link_pb2

_HELLO_LIMIT = 10.0


async def first_frame(frames: AsyncIterator[bytes]) -> bytes:
    """Return a new link's first frame. Raises StatusError if none comes in time."""
    try:
        async with asyncio.timeout(_HELLO_LIMIT):
            return await anext(frames)
    except StopAsyncIteration:
        raise StatusError.invalid("hello", "the link was closed before it was opened") from None
    except TimeoutError:
        message = f"hello: none came within {_HELLO_LIMIT:g} s"
        raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None


def check_tokenizer(hello: link_pb2.Hello, welcome: link_pb2.Welcome) -> None:
    """Raise StatusError FAILED_PRECONDITION if the client states its tokenizer, and it is not the model's."""
    if hello.tokenizer_sha256 and hello.tokenizer_sha256 != welcome.tokenizer_sha256:
        served, own = welcome.tokenizer_sha256.hex()[:12] or "(unknown)", hello.tokenizer_sha256.hex()[:12]
        raise StatusError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"tokenizer_sha256: {welcome.model!r} is served here with tokenizer {served}, the client's is {own}: "
            "its token ids would mean other texts",
            field="tokenizer_sha256",
        )


def lease_of(hello: link_pb2.Hello, lease: float) -> float | None:
    """Return the lease of a link, in seconds; None for a client whose version does not renew leases."""
    return lease if hello.api_minor >= LEASES_SINCE else None
