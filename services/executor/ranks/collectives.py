"""Collectives between processes: NCCL between GPUs, gloo between CPUs, which is slow and there for tests."""

from __future__ import annotations

import socket
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from scalellm.v1 import ranks_pb2

_HOST = "127.0.0.1"
_MEETING_LIMIT = timedelta(minutes=2)


class TorchCollectives:
    """The collectives of this process's default group."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up in place."""
        dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack by rank."""
        stacked = tensor.new_empty((dist.get_world_size(), *tensor.shape))
        dist.all_gather_single(stacked.view(-1), tensor.reshape(-1))
        return stacked


class MeetingPlace:
    """Rank 0's store, on the loopback interface, where the ranks of one start of a group find each other.

    What they write there goes by the name of this start, so a rank that is left of an earlier one finds nobody.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._listener = socket.create_server((_HOST, 0))
        port = self._listener.getsockname()[1]
        self.told = ranks_pb2.RankMeeting(host=_HOST, port=port, generation=uuid.uuid4().hex)
        """Address of this store, for the other ranks."""
        self._store = TCPStore(
            _HOST,
            port,
            size,
            is_master=True,
            timeout=_MEETING_LIMIT,
            wait_for_workers=False,
            master_listen_fd=self._listener.detach(),
        )

    def meet(self, device: torch.device) -> TorchCollectives:
        """Wait for the other ranks."""
        return _meet(self._store, self.told, 0, self._size, device)


def meet_at(told: ranks_pb2.RankMeeting, rank: int, size: int, device: torch.device) -> TorchCollectives:
    """Join rank 0 and the others where rank 0 says."""
    store = TCPStore(told.host, told.port, size, is_master=False, timeout=_MEETING_LIMIT, wait_for_workers=False)
    return _meet(store, told, rank, size, device)


def _meet(store: Store, told: ranks_pb2.RankMeeting, rank: int, size: int, device: torch.device) -> TorchCollectives:
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=PrefixStore(told.generation, store), rank=rank, world_size=size)
    collectives = TorchCollectives()
    # The communicator is made with the first sum, which must not be one that is captured.
    if int(collectives.all_reduce(torch.ones(1, device=device)).item()) != size:
        raise RuntimeError(f"the sum over {size} ranks is wrong")
    return collectives
