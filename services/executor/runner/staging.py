"""Arrays that the host writes and the device reads, at every step, in the same place."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.services.executor.runner.device import Device

HostArrays = Mapping[str, npt.NDArray[Any]]

_ALIGNMENT = 256  # of every array: kernels are compiled for aligned pointers


class StagedArrays:
    """A group of arrays that travels in one copy.

    The device's side never moves, as captured graphs require. The host's side is there twice where steps overlap: while
    one is on its way, the next can be written.

    Args:
        device: reads the arrays.
        fields: name to (number of elements, dtype).
    """

    def __init__(self, device: Device, fields: Mapping[str, tuple[int, torch.dtype]]) -> None:
        offsets, size = {}, 0
        for name, (count, dtype) in fields.items():
            offsets[name] = size
            size += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        buffers = [device.host_buffer(size) for _ in range(2 if device.overlaps else 1)]
        self._is_staged = device.overlaps
        self._hosts = buffers
        self._target = (
            torch.zeros(size, dtype=torch.uint8, device=device.torch_device) if self._is_staged else buffers[0]
        )
        self._current = 0

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[offsets[name] : offsets[name] + count * dtype.itemsize].view(dtype)
                for name, (count, dtype) in fields.items()
            }

        self._arrays: list[HostArrays] = [
            MappingProxyType({name: view.numpy() for name, view in views(buffer).items()}) for buffer in buffers
        ]
        self.tensors: Mapping[str, Tensor] = MappingProxyType(views(self._target))
        """The device's side."""

    def begin(self) -> HostArrays:
        """Return the host's side for the next step; the step before the last must be done."""
        self._current = (self._current + 1) % len(self._hosts)
        return self._arrays[self._current]

    def send(self) -> None:
        """Queue the copy to the device."""
        if self._is_staged:
            self._target.copy_(self._hosts[self._current], non_blocking=True)
