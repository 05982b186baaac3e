"""Products of e4m3 matrices: of few rows here, of many torch's where it takes the operands.

Of few rows, time is that of reading the weight (`own` in the tile table): programs fetch theirs ahead, see `overlap`,
and begin while the kernel before them ends, neither of which torch's do. Here are also scales of blocks and groups.

Every program reads all rows of the input, so with more rows a program has to have more of the weight, or reading the
input from the second-level cache would take longer than memory takes for the weight. With 256 of its rows, and up to 64
of the input, that is a quarter of the weight's bytes. So products of up to 64 rows are made here where a weight has
that much for enough programs, and by torch where it has not.

Hopper multiplies e4m3 as such in tiles of 64 rows of the left operand alone; of fewer it makes float16 first. So in a
product of few rows the weight is the left operand (`swapped` in the tile table), and the unit that adds up many rows
adds up these as well.

The sum over each stretch of the inner dimension that shares its scales is scaled on its own, in float32. (Taken as it
is, the accumulator of Hopper's e4m3 products keeps 14 bits.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.scaled_mm import can_scale_mm, has_e4m3_units, scaled_mm
from scalellm.kernels.triton.overlap import fetch_ahead, row_bytes_ahead, start_after_the_kernel_before

_MIN_BLOCK_K = 32  # of a product of e4m3


@triton.jit(do_not_specialize=["m"])
def _gemm_scaled(
    a,
    b,
    a_scale,
    b_scale,
    bias,
    out,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    A_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    A_SCALE_STRIDE: tl.constexpr,
    A_SCALE_COLUMNS: tl.constexpr,
    B_SCALE_ROWS: tl.constexpr,
    B_SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAPPED: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    fetch_ahead(b, tl.program_id(0) * BLOCK_N, N, K, BLOCK_N, AHEAD, OVERLAPS)
    start_after_the_kernel_before(OVERLAPS)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_rows, live_columns = rows < m, columns < N
    inner = tl.arange(0, BLOCK_K)
    a_at = a + rows[:, None].to(tl.int64) * A_STRIDE + inner[None, :]
    b_at = b + columns[None, :].to(tl.int64) * K + inner[:, None]
    a_scale_at = a_scale + rows.to(tl.int64) * A_SCALE_STRIDE
    b_scale_at = b_scale + columns // (N // B_SCALE_ROWS) * B_SCALE_COLUMNS
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        live_inner = inner < K - start
        of_a = tl.load(a_at + start, mask=live_rows[:, None] & live_inner[None, :], other=0.0)
        of_b = tl.load(b_at + start, mask=live_columns[None, :] & live_inner[:, None], other=0.0)
        if SWAPPED:
            part = tl.trans(tl.dot(tl.trans(of_b), tl.trans(of_a)))
        else:
            part = tl.dot(of_a, of_b)
        # BLOCK_K divides the columns of a scale.
        if A_SCALE_COLUMNS > 1:
            at = a_scale_at + start // (K // A_SCALE_COLUMNS)
            part *= tl.load(at, mask=live_rows, other=0.0)[:, None]
        if B_SCALE_COLUMNS > 1:
            at = b_scale_at + start // (K // B_SCALE_COLUMNS)
            part *= tl.load(at, mask=live_columns, other=0.0)[None, :]
        acc += part
    if A_SCALE_COLUMNS == 1:
        acc *= tl.load(a_scale_at, mask=live_rows, other=0.0)[:, None]
    if B_SCALE_COLUMNS == 1:
        acc *= tl.load(b_scale_at, mask=live_columns, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=live_columns, other=0.0).to(tl.float32)[None, :]
    at = out + rows[:, None].to(tl.int64) * OUT_STRIDE + columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=live_rows[:, None] & live_columns[None, :])


def fp8_gemm(
    launch: Launch,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_sums: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Neither matrix is widened in memory; `b` and `b_scale` are contiguous.

    Raises:
        ValueError: the shape of a scale does not divide its matrix, a scale is shared by several rows of `a`, or it is
            for a stretch of columns that no power of two from 32 on divides.
    """
    rows, inner = a.shape
    columns = b.shape[0]
    if out is None:
        out = torch.empty((rows, columns), dtype=out_dtype, device=a.device)
    tile = launch.tile("fp8_gemm", rows=rows, columns=columns)
    if not tile["own"] and has_e4m3_units(a.device) and can_scale_mm(a, b, a_scale, b_scale, out):
        return scaled_mm(a, b, a_scale, b_scale, bias, out, fast_sums=fast_sums)
    a_scale_rows, a_scale_columns = _parts("a_scale", a_scale, a)
    b_scale_rows, b_scale_columns = _parts("b_scale", b_scale, b)
    if a_scale_rows not in (1, rows):
        raise ValueError(f"a_scale: {a_scale_rows} rows for {rows} of a; there may be one, or one for each")
    block_k = min(tile["block_k"], next_power_of_2(inner))
    for name, parts in (("a_scale", a_scale_columns), ("b_scale", b_scale_columns)):
        if parts > 1:
            width = inner // parts
            block_k = min(block_k, width & -width)
            if block_k < _MIN_BLOCK_K:
                raise ValueError(
                    f"{name}: stretches of {width} columns; the width must be a multiple of {_MIN_BLOCK_K}"
                )
    programs = triton.cdiv(columns, tile["block_n"])
    launch(
        _gemm_scaled,
        (programs, triton.cdiv(rows, tile["block_m"])),
        a,
        b,
        a_scale,
        b_scale,
        bias,
        out,
        rows,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        N=columns,
        K=inner,
        A_STRIDE=a.stride(0),
        OUT_STRIDE=out.stride(0),
        A_SCALE_STRIDE=a_scale.stride(0) if a_scale_rows > 1 else 0,
        A_SCALE_COLUMNS=a_scale_columns,
        B_SCALE_ROWS=b_scale_rows,
        B_SCALE_COLUMNS=b_scale_columns,
        BLOCK_M=tile["block_m"],
        BLOCK_N=tile["block_n"],
        BLOCK_K=max(_MIN_BLOCK_K, block_k),
        SWAPPED=bool(tile["swapped"]),
        AHEAD=row_bytes_ahead(launch.capability, b, tile["block_n"], programs) if tile["own"] else 0,
    )
    return out


def _parts(name: str, scale: Tensor, x: Tensor) -> tuple[int, int]:
    """Return into how many parts a scale divides the rows and the columns of x."""
    if scale.numel() == 1:
        return 1, 1
    rows, columns = scale.shape
    if x.shape[0] % max(rows, 1) or x.shape[1] % columns:
        raise ValueError(f"{name}: shape {tuple(scale.shape)} does not divide {tuple(x.shape)}")
    return rows, columns
