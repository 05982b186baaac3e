"""Quantisation to e4m3 and the product of quantised matrices."""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def to_e4m3(x: Tensor, scale: float | Tensor) -> Tensor:
    """Return `x / scale` in e4m3, clamped to +-448: the format has no infinity, and a bare cast of 449 may be NaN."""
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
