"""A test tool: the code paths of a CUDA device on a machine that has none."""

from collections.abc import Callable

import torch
from torch import Tensor

from scalellm.kernels import Capability
from scalellm.services.executor.runner.device import CpuDevice, Graph


class FakeCudaDevice(CpuDevice):
    """Steps overlap, buffers are staged, decode runs from graphs, as on CUDA; the arithmetic is done on the CPU.

    A graph replays the recorded function, so its buffers are as static as a real graph's; host and device memory are
    apart, so that what is not sent is not seen. `num_captures` and `num_replays` count. What it cannot show: errors of
    order between streams, and anything about time.
    """

    overlaps = True
    has_graphs = True

    def __init__(self, capability: Capability | None = None) -> None:
        super().__init__()
        self.capability = capability or Capability(sm=90, num_sms=4)
        self.num_captures = 0
        self.num_replays = 0

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy, as the values must be those of now."""
        return tensor.clone()

    def to_host(self, tensor: Tensor) -> Tensor:
        """Copy, as the memory may be reused before it is read."""
        return tensor.clone()

    def capture(self, run: Callable[[], None]) -> Graph:
        """Keep the function; like a real capture, do not run it."""
        self.num_captures += 1
        return _FakeGraph(self, run)


class _FakeGraph:
    def __init__(self, device: FakeCudaDevice, run: Callable[[], None]) -> None:
        self._device = device
        self._run = run

    @torch.inference_mode()
    def replay(self) -> None:
        """Run the function."""
        self._device.num_replays += 1
        self._run()
