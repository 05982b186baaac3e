"""The device interface of the model runner: memory, copies, events, graphs. The one place that calls torch.cuda."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from scalellm.kernels import Capability
from scalellm.services.executor.memory import free_memory


class Event(Protocol):
    """A point in the order of the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has passed the event."""


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Queue the recorded work again, on the same memory."""


class Device(Protocol):
    """A device that runs steps. Work is done in the order in which it is queued.

    `overlaps`: work is queued and the host goes on; `has_graphs`: `capture` saves the host work.
    """

    torch_device: torch.device
    capability: Capability
    overlaps: bool
    has_graphs: bool

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Return zeroed host memory, u8, from which `copy_` to the device does not wait."""

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a host tensor on the device, without waiting; the argument may be changed at once."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a host tensor that has the values once an event recorded after this call has passed."""

    def record(self) -> Event:
        """Return an event after all work queued so far."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """Record the work that `run` queues. What it allocates comes from one pool that all graphs share."""

    def free_memory(self) -> int:
        """Return the bytes that can still be allocated."""

    def synchronize(self) -> None:
        """Wait until all queued work is done. Raises the driver's error if the device is lost to this process."""


class _Passed:
    def synchronize(self) -> None:
        """Return at once, because a CPU's work is never queued."""


class CpuDevice:
    """The CPU: work is done when the call returns."""

    overlaps = False
    has_graphs = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.capability = Capability.of(self.torch_device)

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Return plain memory."""
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself, because work that reads it is done before the caller changes it."""
        return tensor

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor

    def record(self) -> Event:
        """Return an event that has passed."""
        return _Passed()

    def capture(self, run: Callable[[], None]) -> Graph:
        """Raise NotImplementedError: a CPU runs work at once and has no graphs."""
        raise NotImplementedError("a CPU has no graphs")

    def free_memory(self) -> int:
        """Return the bytes of memory that the machine, or the container, has left."""
        return free_memory()

    def synchronize(self) -> None:
        """Do nothing, because a CPU's work is never queued."""


class CudaDevice:
    """One NVIDIA GPU; work goes to the current stream."""

    overlaps = True

    def __init__(self, index: int = 0, *, has_graphs: bool = True) -> None:
        self.has_graphs = has_graphs
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self.capability = Capability.of(self.torch_device)
        self._pool = torch.cuda.graph_pool_handle()

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Return page-locked memory."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy by way of page-locked memory, which torch keeps until the copy is done."""
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Queue a copy to page-locked memory, which torch's allocator reuses."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def record(self) -> Event:
        """Record a CUDA event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def capture(self, run: Callable[[], None]) -> Graph:
        """Capture a CUDA graph. Kernels must have been loaded before: loading one during capture is an error."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph

    def free_memory(self) -> int:
        """Ask the driver; what torch holds for reuse counts as taken."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return int(free)

    def synchronize(self) -> None:
        """Wait for the device. A fault of a kernel is sticky: after it every call into CUDA raises the same error."""
        torch.cuda.synchronize(self.torch_device)
