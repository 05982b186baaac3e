"""Captured decode steps, one per padded number of rows."""

import bisect
import functools
from collections.abc import Callable

from scalellm.services.executor.runner.device import Device, Graph


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Return the numbers of rows that decode steps are padded to: 1, 2, 4, then multiples of 8, of 16 from 128 on.

    Few enough to capture in seconds, close enough that padding costs little; the last is `max_num_seqs`.
    """
    sizes = {1, 2, 4, *range(8, 128, 8), *range(128, max_num_seqs, 16), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


class DecodeGraphs:
    """A graph per bucket, all in one memory pool: one is live at a time, so they share what they allocate.

    Args:
        buckets: ascending numbers of rows.
        run: queues a step of so many rows; its inputs and outputs are at fixed places.
        device: captures.
    """

    def __init__(self, buckets: list[int], run: Callable[[int], None], device: Device) -> None:
        self._buckets = buckets
        self._run = run
        self._device = device
        self._graphs: dict[int, Graph] = {}

    def bucket(self, num_rows: int) -> int:
        """Return the number of rows that `num_rows` is padded to."""
        return self._buckets[bisect.bisect_left(self._buckets, num_rows)]

    def capture(self, on_progress: Callable[[int, int], None]) -> None:
        """Run every bucket, and capture it where the device has graphs; `on_progress` gets (done, total).

        The largest comes first: the pool is then as large as it gets.
        """
        for done, size in enumerate(reversed(self._buckets), start=1):
            self._run(size)  # compiles and loads what the capture must find loaded
            self._device.synchronize()
            if self._device.has_graphs:
                self._graphs[size] = self._device.capture(functools.partial(self._run, size))
            on_progress(done, len(self._buckets))

    def run(self, bucket: int) -> None:
        """Queue the step of a bucket: from its graph, or op by op where there is none."""
        graph = self._graphs.get(bucket)
        if graph is None:
            self._run(bucket)
        else:
            graph.replay()
