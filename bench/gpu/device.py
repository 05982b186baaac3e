"""The seam between what is measured and the CUDA calls that measure it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from scalellm.kernels import Capability

Call = Callable[[], object]


class Span(NamedTuple):
    """The span of a kernel or copy on the device, in microseconds."""

    name: str
    start_us: float
    end_us: float


class Device(Protocol):
    """A device on which ops run and are timed."""

    dry_run: bool
    target: torch.device
    capability: Capability
    l2_bytes: int

    def synchronize(self) -> None:
        """Wait for everything queued; raises what went wrong on the device."""

    def capture(self, call: Call) -> Call:
        """Capture what `call` queues in a graph, without running it; the result replays it.

        `call` has run before, so that nothing is compiled or loaded while capturing.
        """

    def time(self, call: Call, *, flush: bool, repeats: int = 15) -> float:
        """Return the median microseconds of what `call` queues, between two events.

        With `flush` the second-level cache holds nothing of the call's data before each repetition.
        """

    def profile(self, call: Call) -> list[Span]:
        """Return the kernels and copies that `call` queues, in the order of their begin."""

    def free_bytes(self) -> int:
        """Return bytes of memory that can still be had."""

    def release(self) -> None:
        """Give back memory of tensors that are gone."""


class CudaDevice:
    """The current CUDA device."""

    dry_run = False

    def __init__(self) -> None:
        self.target = torch.device("cuda", torch.cuda.current_device())
        self.capability = Capability.of(self.target)
        properties = torch.cuda.get_device_properties(self.target)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
        self._flush: torch.Tensor | None = None

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.target)

    def capture(self, call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def time(self, call: Call, *, flush: bool, repeats: int = 15) -> float:
        call()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in pairs:
            if flush:
                self._overwrite_l2()
            start.record()
            call()
            end.record()
        self.synchronize()
        return 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs)

    def profile(self, call: Call) -> list[Span]:
        call()
        self.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            self.synchronize()
        events = (event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)  # type: ignore[attr-defined]
        return sorted(
            (Span(event.name, event.time_range.start, event.time_range.end) for event in events),
            key=lambda span: span.start_us,
        )

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.target)[0])

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def _overwrite_l2(self) -> None:
        # It also keeps the device busy while the host queues what is timed, so the time is the device's alone.
        if self._flush is None:
            self._flush = torch.empty(4 * self.l2_bytes, dtype=torch.uint8, device=self.target)
        self._flush.zero_()


class DryRunDevice:
    """CPU tensors, and kernels on Triton's interpreter. Everything is called once; a time is always the same number.

    It stands for an H200 with four processors, so that grids sized by them stay small.
    """

    dry_run = True

    def __init__(self) -> None:
        self.target = torch.device("cpu")
        self.capability = Capability(sm=90, num_sms=4, name="dry run")
        self.l2_bytes = 1 << 10

    def synchronize(self) -> None:
        pass

    def capture(self, call: Call) -> Call:
        return lambda: call()

    def time(self, call: Call, *, flush: bool, repeats: int = 15) -> float:
        call()
        return 1.0

    def profile(self, call: Call) -> list[Span]:
        return [Span("dry run", 0.0, 1.0), Span("dry run", 3.0, 4.0)]

    def free_bytes(self) -> int:
        return 64 << 30

    def release(self) -> None:
        gc.collect()
