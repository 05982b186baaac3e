"""Products with weights of 4-bit and of 8-bit integers."""

import torch
from torch import Tensor


def w4a16_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    interleave: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return `x @ w`, [T, N], with `w[k, n] = (q[k, n] - zero) * scale`, q in 0..15; computed in float32.

    The C++ form rounds x to 8 bits first, see `kernels.cpu.gemm_wna16`; no other form does.

    Args:
        x: [T, K] float32, bfloat16 or float16.
        qweight: [K / 8, N] i32; bits 4i to 4i+3 of word (r, n) are q[8r + i, n] (the packing of GPTQ), unless
            interleaved.
        scales: [K / group_size, N], shared by group_size consecutive k.
        zeros: [K / group_size, N] of any dtype, zero points in units of q (not packed); None: 8, symmetric weights.
        group_size: divides K; K itself means one scale per column.
        interleave: words side by side whose numbers i are rows side by side: those bits of word (r, n) are
            q[8 (r - r % interleave) + i interleave + r % interleave, n]. Divides K / 8.
        workspace: scratch of a device kernel, f32, of `kernels.gemm_wna16_workspace_size`; has no effect on the result
            and none here.
        out: [T, N], receives the result.

    Raises:
        ValueError: the shapes of scales or zeros do not belong to this K and group_size, or interleave does not
            divide the number of words.
    """
    return _gemm(x, qweight, scales, zeros, 4, group_size, interleave, out)


def w8a16_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    interleave: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `w4a16_gemm`, q in 0..255: qweight is [K / 4, N], four numbers to a word; without zeros, 128 is zero."""
    return _gemm(x, qweight, scales, zeros, 8, group_size, interleave, out)


def check_shapes(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    interleave: int = 1,
    prefix: str = "",
) -> None:
    """Refuse scales and zero points that do not belong to the weight, [K / PACK, N] or [E, K / PACK, N].

    Raises:
        ValueError: so it is; the message calls them by their names after `prefix`.
    """
    *experts, words, columns = qweight.shape
    if words % interleave:
        raise ValueError(f"interleave: {interleave} does not divide the {words} words of a column")
    expected = (*experts, words * (32 // bits) // group_size, columns)
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{prefix}{name}: shape {tuple(tensor.shape)}, not {expected} for group_size {group_size}")


def dequantise_packed(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, interleave: int = 1
) -> Tensor:
    """Return the weight [K, N] in float32 of `qweight` [K / PACK, N]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device).view(1, -1, 1, 1)
    q = (torch.unflatten(qweight, 0, (-1, 1, interleave)) >> shifts) & ((1 << bits) - 1)
    q = q.reshape(-1, group_size, qweight.shape[1]).float()
    zero = float(1 << (bits - 1)) if zeros is None else zeros.float().unsqueeze(1)
    return ((q - zero) * scales.float().unsqueeze(1)).flatten(0, 1)


def _gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    interleave: int,
    out: Tensor | None,
) -> Tensor:
    check_shapes(qweight, scales, zeros, bits, group_size, interleave)
    result = x.float() @ dequantise_packed(qweight, scales, zeros, bits, group_size, interleave)
    return result.to(x.dtype) if out is None else out.copy_(result)
