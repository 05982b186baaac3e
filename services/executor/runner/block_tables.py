"""The block tables of all rows, on the host and on the device."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CpuLibrary
from scalellm.kernels.cpu.rows import gather_rows
from scalellm.services.executor.engine.batch import ScheduledSequence
from scalellm.services.executor.runner.device import Device


class BlockTables:
    """Keeps one table per row and writes only new entries, so that a step's cost does not depend on the context's
    length.

    Attributes:
        host: `[num_rows, max_blocks]` i32.
        device: the same on the device.
    """

    def __init__(self, num_rows: int, max_blocks: int, device: Device, library: CpuLibrary | None) -> None:
        self._device = device
        self._library = library
        self._is_staged = device.overlaps
        self.host: npt.NDArray[np.int32] = np.zeros((num_rows, max_blocks), dtype=np.int32)
        shared = torch.from_numpy(self.host)
        self.device = shared.to(device.torch_device, copy=True) if self._is_staged else shared

    def update(self, sequences: list[ScheduledSequence]) -> None:
        """Write the entries of a step's sequences that are new to the runner."""
        width = self.host.shape[1]
        places: list[npt.NDArray[np.int64]] = []
        for scheduled in sequences:
            row, table, first = scheduled.seq.row, scheduled.seq.block_table, scheduled.first_new_block
            if first < len(table):
                self.host[row, first : len(table)] = table[first:]
                if self._is_staged:
                    places.append(np.arange(row * width + first, row * width + len(table)))
        if places:
            at = np.concatenate(places)
            values = torch.from_numpy(self.host.reshape(-1)[at])
            self.device.view(-1).scatter_(
                0, self._device.to_device(torch.from_numpy(at)), self._device.to_device(values)
            )

    def slots(
        self, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], block_size: int
    ) -> npt.NDArray[np.int64]:
        """Return the cache slots of positions, each in its row."""
        blocks = self.host[rows, positions // block_size].astype(np.int64)
        return blocks * block_size + positions % block_size

    def gather(self, rows: Tensor, out: Tensor) -> Tensor:
        """Write the tables of some rows `[S]` i64 to `out[:S]`, on the device, and return these."""
        if self._library is not None:
            return gather_rows(self._library, self.device, rows, out=out)
        return torch.index_select(self.device, 0, rows, out=out[: rows.shape[0]])
