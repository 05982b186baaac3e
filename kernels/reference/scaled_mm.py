"""torch's product of e4m3 matrices on the matrix units, by way of whichever name this version of torch has for it."""

import torch
import torch.nn.functional as F
from torch import Tensor

_MULTIPLE = 16  # of both dimensions of the weight: what cuBLAS and CUTLASS want of e4m3


def has_e4m3_units(device: torch.device) -> bool:
    """True if the matrix units of a device multiply e4m3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def can_scale_mm(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out: Tensor) -> bool:
    """True if `scaled_mm` takes these: scales of a tensor or of its rows, bfloat16 results, dimensions in sixteens."""
    whole_or_rows = (a_scale.numel() == 1 or a_scale.shape[1:] == (1,)) and (
        b_scale.numel() == 1 or (b_scale.shape[1:] == (1,) and b_scale.shape[0] == b.shape[0])
    )
    aligned = b.shape[0] % _MULTIPLE == 0 and b.shape[1] % _MULTIPLE == 0
    return whole_or_rows and aligned and out.dtype == torch.bfloat16 and a.is_contiguous() and b.is_contiguous()


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    fast_sums: bool = False,
) -> Tensor:
    """Write `(a * a_scale) @ (b * b_scale).T + bias` to `out` [M, N] bfloat16.

    Args:
        a: [M, K] e4m3.
        b: [N, K] e4m3.
        a_scale: f32, one element or [M, 1].
        b_scale: f32, one element or [N, 1]. When only one of the scales has rows, the other is spread over its own.
        bias: [N] or None.
        out: receives the result.
        fast_sums: leave sums in Hopper's accumulators of 14 bits instead of adding them up in float32 now and then:
            faster with many rows, and less exact. Served models do so with the setting `fp8_fast_sums`.
    """
    rows = a_scale.numel() > 1 or b_scale.numel() > 1
    if rows:
        a_scale = a_scale.reshape(-1, 1).expand(a.shape[0], 1).contiguous()
        b_scale = b_scale.reshape(-1, 1).expand(b.shape[0], 1).contiguous().t()
    if bias is not None:
        bias = bias.to(out.dtype)
    if hasattr(torch, "_scaled_mm"):  # takes `out`, as the public function of torch 2.13 does not
        return torch._scaled_mm(
            a, b.t(), a_scale, b_scale, bias=bias, out_dtype=out.dtype, out=out, use_fast_accum=fast_sums
        )
    recipe = F.ScalingType.RowWise if rows else F.ScalingType.TensorWise
    result = F.scaled_mm(
        a, b.t(), a_scale, recipe, b_scale, recipe, bias=bias, output_dtype=out.dtype, use_fast_accum=fast_sums
    )
    return out.copy_(result)
