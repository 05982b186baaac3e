"""The schedulers' own reports of their states."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc

from scalellm.services.common.link import LinkDialer
from scalellm.services.common.reload import ConfigFileError
from scalellm.v1 import scheduler_pb2, scheduler_pb2_grpc

_PATIENCE = 0.9
"""Seconds to wait for a state. The next snapshot is due one second after this one."""

State = scheduler_pb2.GetStateResponse | str
"""State of a scheduler, or the reason why there is none."""


class SchedulerStates:
    """Asks each scheduler for its state, over connections that last until `close`."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def read(self, dialers: Mapping[str, LinkDialer]) -> dict[str, State]:
        """Return the state of each scheduler, by address.

        Args:
            dialers: Dialers of the schedulers, by their addresses.
        """
        for address in self._channels.keys() - dialers.keys():
            await self._channels.pop(address).close()
        states = await asyncio.gather(*(self._ask(address, dialer) for address, dialer in dialers.items()))
        return dict(zip(dialers, states, strict=True))

    async def close(self) -> None:
        """End the connections."""
        channels, self._channels = self._channels, {}  # replaced at once, because `read` may be called during the close
        for channel in channels.values():
            await channel.close()

    async def _ask(self, address: str, dialer: LinkDialer) -> State:
        try:
            if address not in self._channels:
                self._channels[address] = dialer.open_channel(address)
            stub: Any = scheduler_pb2_grpc.SchedulerStub(self._channels[address])  # type: ignore[no-untyped-call]
            call = stub.GetState(scheduler_pb2.GetStateRequest(), timeout=_PATIENCE, metadata=dialer.metadata())
            state: scheduler_pb2.GetStateResponse = await call
            return state
        except ConfigFileError as error:
            return str(error)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"did not answer within {_PATIENCE:g} s"
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return "tells its state only to whoever shows a link token (--link-token-file)"
            return str(error.details() or error.code().name)
