"""Collectives between processes: NCCL between GPUs; gloo between CPUs, which is slow and meant for tests."""

from __future__ import annotations

import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from scalellm.services.common.addresses import bound_socket
from scalellm.services.common.lifecycle import StartError
from scalellm.v1 import ranks_pb2

_MEETING_LIMIT = timedelta(minutes=2)


class TorchCollectives:
    """The collectives of this process's default group."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up in place, on a CPU in the order of the ranks.

        The order of gloo's own sum depends on the tensor's size, so that a row's would depend on the rows beside it.
        """
        if tensor.device.type != "cpu":
            dist.all_reduce(tensor)
            return tensor
        first, *others = self.all_gather(tensor)
        for other in others:
            first += other
        return tensor.copy_(first)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack by rank."""
        stacked = tensor.new_empty((dist.get_world_size(), *tensor.shape))
        dist.all_gather_single(stacked.view(-1), tensor.reshape(-1))
        return stacked


class MeetingPlace:
    """Rank 0's store, through which the ranks of one start of a group find each other.

    Keys are prefixed with a unique name of the start, so that a rank left over from an earlier start cannot join.

    Args:
        size: Number of ranks.
        device: Device of rank 0.
        host: IP address of this host by which all ranks reach it.
    """

    def __init__(self, size: int, device: torch.device, host: str) -> None:
        self._size = size
        self._device = device
        self._listener = bound_socket(host, 0)
        self._listener.listen(size)
        port = self._listener.getsockname()[1]
        self.told = ranks_pb2.RankMeeting(host=host, port=port, generation=uuid.uuid4().hex, device=device.type)
        """Address of this store, for the other ranks."""
        self._store = TCPStore(
            host,
            port,
            size,
            is_master=True,
            timeout=_MEETING_LIMIT,
            wait_for_workers=False,
            master_listen_fd=self._listener.detach(),
        )

    def meet(self) -> TorchCollectives:
        """Wait for the other ranks."""
        return _meet(self._store, self.told, 0, self._size, self._device)


def meet_at(told: ranks_pb2.RankMeeting, rank: int, size: int, device: torch.device) -> TorchCollectives:
    """Join the other ranks at rank 0's store. Raises StartError if rank 0 computes on another kind of device."""
    if told.device != device.type:
        raise StartError(f"--device {device.type}: that of rank 0 is {told.device}, and all ranks need the same")
    store = TCPStore(told.host, told.port, size, is_master=False, timeout=_MEETING_LIMIT, wait_for_workers=False)
    return _meet(store, told, rank, size, device)


def _meet(store: Store, told: ranks_pb2.RankMeeting, rank: int, size: int, device: torch.device) -> TorchCollectives:
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=PrefixStore(told.generation, store), rank=rank, world_size=size)
    collectives = TorchCollectives()
    # The first sum creates the communicator, which must not happen during the capture of a graph.
    if int(collectives.all_reduce(torch.ones(1, device=device)).item()) != size:
        raise RuntimeError(f"the sum over {size} ranks is wrong")
    return collectives
