"""The expert layer of a mixture.

For few tokens, time is that of reading the experts that were hit: a grouped product whose blocks of 16 or 64 rows have
one expert each, in the layout of `moe_align_block_size`; its grid is an upper bound, and programs past the last block
leave at once. For many tokens of unquantised weights, torch's grouped product. Either way the outputs of a token's
experts are written apart and added in a fixed order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch
from kernels.triton.activation import silu_and_mul
from kernels.triton.moe_routing import layout_sizes, moe_align_block_size

_BLOCK_N = 64
_BLOCK_K = 128
_COMBINE = 1024
_MIN_BLOCK_K = 16
_MANY_ROWS = 64  # of an expert, on average: from here on, the experts are not what is waited for


@triton.jit(do_not_specialize=["pairs"])
def _grouped_gemm(
    x,
    weight,
    scale,
    sorted_token_ids,
    expert_ids,
    used,
    out,
    pairs,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write, for each pair, its row of x times its expert's weight [N, K] to its row of `out` [pairs, N]."""
    block = tl.program_id(1)
    if block * BLOCK_M < tl.load(used):
        pair = tl.load(sorted_token_ids + block * BLOCK_M + tl.arange(0, BLOCK_M))
        live = pair < pairs
        expert = tl.load(expert_ids + block).to(tl.int64)
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        live_columns = columns < N
        inner = tl.arange(0, BLOCK_K)
        x_at = x + (pair // PAIRS_PER_ROW).to(tl.int64)[:, None] * X_STRIDE + inner[None, :]
        weight_at = weight + expert * N * K + columns[None, :].to(tl.int64) * K + inner[:, None]
        if scale is not None:
            scale_at = scale + (expert * SCALE_ROWS + columns // (N // SCALE_ROWS)) * SCALE_COLUMNS
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            live_inner = inner < K - start
            xs = tl.load(x_at + start, mask=live[:, None] & live_inner[None, :], other=0.0)
            ws = tl.load(weight_at + start, mask=live_columns[None, :] & live_inner[:, None], other=0.0)
            if SCALE_COLUMNS > 1:  # BLOCK_K divides the columns of a scale
                at = scale_at + start // (K // SCALE_COLUMNS)
                part = tl.dot(xs, ws.to(xs.dtype), input_precision="ieee")
                acc += part * tl.load(at, mask=live_columns, other=0.0)[None, :]
            else:
                acc = tl.dot(xs, ws.to(xs.dtype), acc, input_precision="ieee")
        if SCALE_COLUMNS == 1:
            acc *= tl.load(scale_at, mask=live_columns, other=0.0)[None, :]
        at = out + pair.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & live_columns[None, :])


@triton.jit
def _combine(y, weights, out, H: tl.constexpr, TOP_K: tl.constexpr, OUT_STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        pair = token * TOP_K + i
        value = tl.load(y + pair * H + columns, mask=columns < H, other=0.0).to(tl.float32)
        total += value * tl.load(weights + pair)
    tl.store(out + token * OUT_STRIDE + columns, total.to(out.dtype.element_ty), mask=columns < H)


def fused_moe(
    launch: Launch,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Hidden rows are rounded to the dtype of x, as between the layers of a dense model.

    Weights, scales, `weights` and `ids` are contiguous.

    Raises:
        ValueError: a scale is for blocks of a width that no power of two from 16 on divides.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    experts, width = w13.shape[:2]
    tokens, hidden = x.shape
    choices = ids.shape[1]
    pairs = tokens * choices
    if pairs == 0:
        return out
    if pairs >= _MANY_ROWS * experts and w13.dtype == x.dtype == torch.bfloat16:
        y = _many_tokens(launch, x, w13, w2, ids)
    else:
        block_m = 16 if pairs < _MANY_ROWS * experts else 64
        sizes = _workspace_parts(tokens, choices, experts, width, hidden, block_m)
        if workspace is None:
            workspace = torch.empty(sum(sizes), dtype=torch.int32, device=x.device)
        parts = _carve(workspace, sizes)
        layout = moe_align_block_size(
            launch, ids, block_m, experts, workspace=parts[3], out=(parts[0], parts[1], parts[2])
        )
        gate_up = parts[4].view(x.dtype)[: pairs * width].view(pairs, width)
        middle = parts[5].view(x.dtype)[: pairs * (width // 2)].view(pairs, width // 2)
        y = parts[6].view(torch.float32).view(pairs, hidden)
        _grouped(launch, x, w13, w13_scale, layout, gate_up, block_m, "w13_scale")
        silu_and_mul(launch, gate_up, out=middle)
        _grouped(launch, middle, w2, w2_scale, layout, y, block_m, "w2_scale")
    sums = {"H": hidden, "TOP_K": choices, "OUT_STRIDE": out.stride(0), "BLOCK": _COMBINE}
    launch(_combine, (tokens, triton.cdiv(hidden, _COMBINE)), y, weights, out, **sums)
    return out


def fused_moe_workspace_size(tokens: int, choices: int, experts: int, width: int, hidden: int) -> int:
    """Return the length of the i32 tensor that `fused_moe` wants for up to so many tokens; width is that of w13."""
    return max(sum(_workspace_parts(tokens, choices, experts, width, hidden, block)) for block in (16, 64))


def _workspace_parts(tokens: int, choices: int, experts: int, width: int, hidden: int, block_m: int) -> tuple[int, ...]:
    """Lengths of the layout's three results and counts, both hidden rows and the outputs, in multiples of 16 bytes."""
    pairs = tokens * choices
    size, blocks, counts = layout_sizes(pairs, block_m, experts)
    return tuple(-(-n // 4) * 4 for n in (size, blocks, 1, counts, pairs * width, pairs * (width // 2), pairs * hidden))


def _carve(workspace: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    parts, start = [], 0
    for size in sizes:
        parts.append(workspace[start : start + size])
        start += size
    return parts


def _grouped(
    launch: Launch,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    layout: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    block_m: int,
    name: str,
) -> None:
    _, n, k = weight.shape
    pairs = out.shape[0]
    scale_rows, scale_columns = (0, 0) if scale is None else tuple(scale.shape[1:])
    block_k = min(_BLOCK_K, max(_MIN_BLOCK_K, triton.next_power_of_2(k)))
    if scale_columns > 1:
        block_k = min(block_k, (k // scale_columns) & -(k // scale_columns))
        if block_k < _MIN_BLOCK_K:
            raise ValueError(f"{name}: blocks of {k // scale_columns} columns; the width must be a multiple of 16")
    blocks = min(pairs, layout[1].shape[0])  # every block has a pair
    launch(
        _grouped_gemm,
        (triton.cdiv(n, _BLOCK_N), blocks),
        x,
        weight,
        scale,
        *layout,
        out,
        pairs,
        num_stages=4,
        N=n,
        K=k,
        X_STRIDE=x.stride(0),
        PAIRS_PER_ROW=pairs // x.shape[0],
        SCALE_ROWS=scale_rows,
        SCALE_COLUMNS=scale_columns,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=block_k,
    )


def _many_tokens(launch: Launch, x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor) -> Tensor:
    """Return the outputs of all pairs by torch's grouped product, whose groups need no padding."""
    experts = w13.shape[0]
    order, expert_of, _ = moe_align_block_size(launch, ids, 1, experts)
    ends = torch.searchsorted(
        expert_of, torch.arange(experts, dtype=torch.int32, device=x.device), right=True, out_int32=True
    )
    rows = x.index_select(0, order // ids.shape[1])
    middle = silu_and_mul(launch, _grouped_mm(rows, w13.transpose(1, 2), ends))
    y = _grouped_mm(middle, w2.transpose(1, 2), ends)
    return torch.empty_like(y).index_copy_(0, order.long(), y)


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Under its public name from torch 2.13 on, before under a private one."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    result: Tensor = product(a, b, offs=ends)
    return result
