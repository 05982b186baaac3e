"""The scheduler's word on a request at its beginning and at its end."""

from __future__ import annotations

import asyncio

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import link_pb2

_ACCEPTANCE = 0.05
"""Seconds given to the scheduler to refuse a request before Started says that it was accepted. A refusal before the
first message leaves gRPC's own retry policies free to act."""


async def wait_accepted(receiver: TokenReceiver) -> None:
    """Return once the request is taken to be accepted. Raises StatusError if it is refused at once."""
    try:
        async with asyncio.timeout(_ACCEPTANCE):
            await receiver.wait()
    except TimeoutError:
        pass
    raise_failure(receiver.finish)
    receiver.wake()  # what came is still to be taken


def raise_failure(finish: link_pb2.Finish | None) -> None:
    """Raise StatusError if the scheduler ended the request with one."""
    if finish is not None and finish.status.code:
        raise StatusError.from_link(finish.status)
