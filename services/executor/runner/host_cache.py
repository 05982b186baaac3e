"""KV-cache blocks in host memory, for preempted sequences."""

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from scalellm.kernels.reference.cache import block_bytes
from scalellm.services.executor.engine.swap import SwapCost
from scalellm.services.executor.models import KVCache
from scalellm.services.executor.runner.device import Device

_GROUP = 16  # blocks gathered at a time: bounds the scratch on the device
_CHUNK = 1 << 30  # bytes allocated at a time: torch rounds page-locked memory up to a power of two
_ROUNDS = 3


class HostCache:
    """A block's keys and values of all layers lie side by side, so that each block is one transfer.

    On the device a block is spread over the layers' caches; it is gathered there first, which costs little: memory on
    the device is some eighty times as fast as the bus. Copies between a layer's cache and the host directly would be
    thousands of small ones, at some 2 us each. All work is queued in order with the steps.

    Args:
        kv_caches: of all layers.
        num_blocks: blocks in host memory.
        device: where the caches are.
    """

    def __init__(self, kv_caches: list[KVCache], num_blocks: int, device: Device) -> None:
        self._device = device
        caches = itertools.chain.from_iterable((cache.k, cache.v) for cache in kv_caches)
        self._caches = [block_bytes(cache) for cache in caches]
        self.bytes_per_block = sum(cache.shape[1] for cache in self._caches)
        self._shape = (len(self._caches), self.bytes_per_block // len(self._caches))
        most = max(1, _CHUNK // self.bytes_per_block)
        counts = [min(most, num_blocks - first) for first in range(0, num_blocks, most)]
        self._blocks = [
            block
            for count in counts
            for block in device.host_buffer(count * self.bytes_per_block).view(count, *self._shape)
        ]

    def store(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks, (on the device, on the host), to the host."""
        for blocks, host_blocks in self._groups(pairs):
            gathered = torch.stack([cache.index_select(0, blocks) for cache in self._caches], dim=1)
            for host_block, part in zip(host_blocks, gathered, strict=True):
                host_block.copy_(part, non_blocking=True)

    def load(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks, (on the device, on the host), back to the device."""
        for blocks, host_blocks in self._groups(pairs):
            gathered = torch.empty((len(host_blocks), *self._shape), dtype=torch.uint8, device=blocks.device)
            for host_block, part in zip(host_blocks, gathered, strict=True):
                part.copy_(host_block, non_blocking=True)
            for cache, blocks_of_layer in zip(self._caches, gathered.unbind(1), strict=True):
                cache.index_copy_(0, blocks, blocks_of_layer)

    def _groups(self, pairs: list[tuple[int, int]]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield, for a few pairs at a time, the blocks' numbers on the device and their memory on the host."""
        for start in range(0, len(pairs), _GROUP):
            group = pairs[start : start + _GROUP]
            blocks = self._device.to_device(torch.tensor([block for block, _ in group]))
            yield blocks, [self._blocks[host_block] for _, host_block in group]

    def measure(self) -> SwapCost:
        """Measure the cost of copies, with some of one block and some of several. Blocks keep their content."""
        count = min(_GROUP, len(self._blocks), self._caches[0].shape[0])
        one, several = self._seconds(1), self._seconds(count)
        per_block = max((several - one) / (count - 1), 1e-9) if count > 1 else one
        return SwapCost(
            bytes_per_block=self.bytes_per_block,
            bytes_per_second=self.bytes_per_block / per_block,
            seconds_per_transfer=max(0.0, one - per_block),
        )

    def _seconds(self, count: int) -> float:
        """Time a copy of the first blocks in one direction: half of there and back."""
        pairs = [(block, block) for block in range(count)]
        best = float("inf")
        for _ in range(_ROUNDS):
            self._device.synchronize()
            started = time.perf_counter()
            self.store(pairs)
            self.load(pairs)
            self._device.synchronize()
            best = min(best, time.perf_counter() - started)
        return best / 2
