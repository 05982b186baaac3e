"""The device and the number formats in which a model computes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scalellm.kernels import Ops
from scalellm.services.executor.models.quantization import Quantization
from scalellm.services.executor.models.shard import Shard


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as settings and reports have it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ModelRuntime:
    """The ops a model calls, the dtype of its activations and of weights that are not quantised, its device, and how
    the weights are to be quantised.

    The ops are those chosen for that device (`kernels.select_ops`); the default is plain torch in float32 on the CPU.
    `shard` says what this rank holds of the model; the default is all of it. `fp8_fast_sums` is `fast_sums` of
    `kernels.fp8_gemm`. `allocate` gets the memory of weights:
    shape, dtype and device, as `torch.empty` takes them.
    """

    ops: Ops = field(default_factory=Ops)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quantization: Quantization = field(default_factory=Quantization)
    shard: Shard = field(default_factory=Shard)
    fp8_fast_sums: bool = False

    allocate: Callable[..., Tensor] = torch.empty

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised weight."""
        return self.allocate(shape, dtype=dtype or self.dtype, device=self.device)
