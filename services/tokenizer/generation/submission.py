"""The scheduler's acceptance or refusal of a request, and its status at the end."""

from __future__ import annotations

import asyncio

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import link_pb2

_ACCEPTANCE = 0.05
"""Seconds to wait for a refusal by the scheduler before Started is sent. After a refusal that comes before the first
message, gRPC's own retry policies can still act."""


async def wait_accepted(receiver: TokenReceiver) -> None:
    """Wait until the request counts as accepted: its first result came, or some time passed. Raises StatusError if it
    is refused.
    """
    try:
        async with asyncio.timeout(_ACCEPTANCE):
            await receiver.wait()
    except TimeoutError:
        pass
    raise_failure(receiver.finish)
    receiver.wake()  # the result that came has still to be taken


def raise_failure(finish: link_pb2.Finish | None) -> None:
    """Raise StatusError if the scheduler ended the request with one."""
    if finish is not None and finish.status.code:
        raise StatusError.from_link(finish.status)
