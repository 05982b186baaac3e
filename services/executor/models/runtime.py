"""Where and in what form a model computes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import Ops


@dataclass(frozen=True)
class ModelRuntime:
    """The ops a model calls, the dtype of its activations and of weights that are not quantised, and its device.

    The ops are those chosen for that device (`kernels.select_ops`); the default is plain torch in float32 on the CPU.
    """

    ops: Ops = field(default_factory=Ops)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised weight."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)
