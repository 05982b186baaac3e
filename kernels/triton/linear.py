"""Products with a weight of few rows, the norm before and the activation or addition after them in the same kernel.

The time of such a product is that of reading the weight, so a program streams 32 of its rows through shared memory, and
a decoder layer takes six launches instead of nine. The weight is the left operand: of a matrix unit's tile of 16 x 8,
few rows of x then leave none of the 16 idle, and each warp norms a half of a tile of x where all four would norm the
whole. All sums have one order, whatever the number of rows: a row does not depend on those beside it.

A norm needs sums over a whole row before its first number can be scaled. The kernel that adds to the residual stream
leaves the squares of its own columns behind, so nobody reads the row twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.linear import SQUARED_TOGETHER, Gate, RowNorm, check_fused, num_squares
from scalellm.kernels.triton.activation import activated_product
from scalellm.kernels.triton.norm import scaled_by_norm
from scalellm.kernels.triton.overlap import fetch_ahead, row_bytes_ahead, start_after_the_kernel_before

_BLOCK_M = 16


@triton.jit(do_not_specialize=["m"])
def _linear_of_few_rows(
    x,
    weight,
    bias,
    norm_squares,
    norm_weight,
    out,
    squares,
    eps,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    GEMMA: tl.constexpr,
    GATE: tl.constexpr,
    ADDS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Write BLOCK_N columns of the result, or add them to it; GATE is the name of an activation or None."""
    fetch_ahead(weight, tl.program_id(0) * BLOCK_N, N, K, BLOCK_N, AHEAD, OVERLAPS)
    if GATE is not None:
        fetch_ahead(weight + N * K, tl.program_id(0) * BLOCK_N, N, K, BLOCK_N, AHEAD, OVERLAPS)
    start_after_the_kernel_before(OVERLAPS)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    live_rows = rows < m
    live_columns = (columns < N) | (N % BLOCK_N == 0)  # constant where it can be
    if norm_weight is not None:
        part = tl.arange(0, BLOCK_PARTS)
        at = norm_squares + rows[:, None] * PARTS + part[None, :]
        summed = tl.sum(tl.load(at, mask=live_rows[:, None] & (part < PARTS)[None, :], other=0.0), axis=1)
        rstd = tl.rsqrt(summed / K + eps)[:, None]
    x_at = x + rows.to(tl.int64)[:, None] * X_STRIDE + inner[None, :]
    weight_at = weight + columns.to(tl.int64)[:, None] * K + inner[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        live = (inner < K - start) | (K % BLOCK_K == 0)
        of_x = tl.load(x_at + start, mask=live_rows[:, None] & live[None, :], other=0.0)
        if norm_weight is not None:
            w = tl.load(norm_weight + start + inner, mask=live, other=0.0).to(tl.float32)
            of_x = scaled_by_norm(of_x, rstd, w[None, :], GEMMA)
        live_weight = live_columns[:, None] & live[None, :]
        acc = tl.dot(tl.load(weight_at + start, mask=live_weight, other=0.0), tl.trans(of_x), acc)
        if GATE is not None:
            up_at = weight_at + N * K + start
            second = tl.dot(tl.load(up_at, mask=live_weight, other=0.0), tl.trans(of_x), second)
    if bias is not None:
        acc += tl.load(bias + columns, mask=live_columns, other=0.0).to(tl.float32)[:, None]
        if GATE is not None:
            second += tl.load(bias + N + columns, mask=live_columns, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    result = tl.trans(acc).to(dtype)
    if GATE is not None:
        result = activated_product(result, tl.trans(second).to(dtype), GATE == "gelu_tanh").to(dtype)
    out_at = out + rows.to(tl.int64)[:, None] * OUT_STRIDE + columns[None, :]
    live_out = live_rows[:, None] & live_columns[None, :]
    if ADDS:
        before = tl.load(out_at, mask=live_out, other=0.0).to(tl.float32)
        result = (before + result.to(tl.float32)).to(dtype)
        if squares is not None:
            wide = tl.where(live_columns[None, :], result.to(tl.float32), 0.0)
            at = squares + rows * tl.num_programs(0) + tl.program_id(0)
            tl.store(at, tl.sum(wide * wide, axis=1), mask=live_rows)
    tl.store(out_at, result, mask=live_out)


def fused_linear(
    launch: Launch,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | None = None,
    gate: Gate | None = None,
    residual: Tensor | None = None,
    squares: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One launch. Rows of `x`, `residual` and `out` may have any stride; the other operands are contiguous.

    Raises:
        ValueError: `x` has more rows than the tile table takes, or options exclude each other.
    """
    check_fused(gate, residual, squares, out)
    rows, inner = x.shape
    matrices = 1 if gate is None else 2
    columns = weight.shape[0] // matrices
    tile = launch.tile("fused_linear", matrices=matrices)
    if rows > tile["max_rows"]:
        raise ValueError(f"x: {rows} rows; fused_linear takes {tile['max_rows']} at most")
    target = residual if residual is not None else out
    if target is None:
        target = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    parts = num_squares(inner)
    programs = triton.cdiv(columns, SQUARED_TOGETHER)
    launch(
        _linear_of_few_rows,
        (programs if rows else 0,),
        x,
        weight,
        bias,
        None if norm is None else norm.squares,
        None if norm is None else norm.weight,
        target,
        squares,
        0.0 if norm is None else norm.eps,
        rows,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        N=columns,
        K=inner,
        X_STRIDE=x.stride(0),
        OUT_STRIDE=target.stride(0),
        GEMMA=norm is not None and norm.gemma,
        GATE=gate,
        ADDS=residual is not None,
        PARTS=parts,
        BLOCK_PARTS=next_power_of_2(parts),
        BLOCK_M=_BLOCK_M,
        BLOCK_N=SQUARED_TOGETHER,
        BLOCK_K=min(tile["block_k"], max(16, next_power_of_2(inner))),
        AHEAD=row_bytes_ahead(launch.capability, weight, matrices * SQUARED_TOGETHER, programs),
    )
    return target
