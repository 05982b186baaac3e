"""Product with a weight of 4-bit integers."""

import torch
from torch import Tensor


def w4a16_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return `x @ w`, [T, N], with `w[k, n] = (q[k, n] - zero) * scale`, q in 0..15; computed in float32.

    Args:
        x: [T, K] float32, bfloat16 or float16.
        qweight: [K / 8, N] i32; bits 4i to 4i+3 of word (r, n) are q[8r + i, n] (the packing of GPTQ).
        scales: [K / group_size, N], shared by group_size consecutive k.
        zeros: [K / group_size, N] of any dtype, zero points in units of q (not packed); None: 8, symmetric weights.
        group_size: divides K; K itself means one scale per column.
        out: [T, N], receives the result.

    Raises:
        ValueError: the shapes of scales or zeros do not belong to this K and group_size.
    """
    words, columns = qweight.shape
    expected = (words * 8 // group_size, columns)
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, not {expected} for group_size {group_size}")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=qweight.device).view(1, 8, 1)
    q = ((qweight.unsqueeze(1) >> shifts) & 15).view(-1, group_size, columns).float()
    zero = 8.0 if zeros is None else zeros.float().unsqueeze(1)
    weight = ((q - zero) * scales.float().unsqueeze(1)).flatten(0, 1)
    result = x.float() @ weight
    return result.to(x.dtype) if out is None else out.copy_(result)
