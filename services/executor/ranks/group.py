"""Rank 0's connections to the other ranks, and the meeting of all ranks before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from scalellm.services.executor.ipc import EngineChannel, Kind, Message
from scalellm.services.executor.models.shard import Shard
from scalellm.services.executor.ranks.collectives import MeetingPlace, meet_at
from scalellm.services.executor.ranks.leading_runner import RanksApartError
from scalellm.v1 import ranks_pb2

_PATIENCE = 3600.0
_LOOPBACK = "127.0.0.1"

Tell = Callable[[ranks_pb2.RankPlan], None]


class Followers:
    """Rank 0's connections to the other ranks.

    Args:
        channels: One to each of them, by rank.
    """

    def __init__(self, channels: Sequence[EngineChannel]) -> None:
        self._channels = channels

    def __len__(self) -> int:
        return len(self._channels)

    def tell(self, plan: ranks_pb2.RankPlan) -> None:
        """Send a plan to all other ranks. Raises RanksApartError if one is gone."""
        message = Message(Kind.PLAN, payload=plan.SerializeToString())
        for rank, channel in enumerate(self._channels, start=1):
            try:
                channel.send(message)
            except EOFError:
                raise RanksApartError(f"rank {rank} is gone") from None

    def meet(self, expert_parallel: int, device: torch.device) -> Shard:
        """Send the address of the store to the other ranks, and wait for them there. Returns rank 0's shard."""
        size = len(self._channels) + 1
        hosts = [channel.local_host for channel in self._channels]
        # the address by which other hosts reach it
        place = MeetingPlace(size, device, next(filter(None, hosts), _LOOPBACK))
        self.tell(ranks_pb2.RankPlan(meeting=place.told))
        return Shard(0, size, expert_parallel, place.meet())


def plans_from(channel: EngineChannel) -> Iterator[ranks_pb2.RankPlan]:
    """Yield rank 0's plans. Raises EOFError once rank 0 is gone."""
    while True:
        for message in channel.receive(_PATIENCE):
            yield ranks_pb2.RankPlan.FromString(message.payload)


def join(
    plans: Iterator[ranks_pb2.RankPlan], rank: int, size: int, expert_parallel: int, device: torch.device
) -> Shard:
    """Meet the other ranks at the address in rank 0's first plan. Returns this rank's shard."""
    return Shard(rank, size, expert_parallel, meet_at(next(plans).meeting, rank, size, device))
