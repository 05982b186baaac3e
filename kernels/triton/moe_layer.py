"""The common part of expert layers for all kinds of weights: scratch, the path for many tokens, and the final sum."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch
from scalellm.kernels.triton.activation import silu_and_mul
from scalellm.kernels.triton.moe_routing import moe_align_block_size
from scalellm.kernels.workspaces import fused_moe_parts

MANY_ROWS = 64  # of an expert, on average: from here on, the experts are not what is waited for
_COMBINE = 1024

Layout = tuple[Tensor, Tensor, Tensor]


def lay_out(
    launch: Launch, x: Tensor, ids: Tensor, experts: int, width: int, block_m: int, workspace: Tensor | None
) -> tuple[Layout, Tensor, Tensor, Tensor]:
    """Return the layout of pairs by expert and room for both hidden rows and the output of each pair."""
    tokens, choices = ids.shape
    hidden = x.shape[1]
    pairs = tokens * choices
    sizes = fused_moe_parts(tokens, choices, experts, width, hidden, block_m)
    if workspace is None:
        workspace = torch.empty(sum(sizes), dtype=torch.int32, device=x.device)
    parts, start = [], 0
    for size in sizes:
        parts.append(workspace[start : start + size])
        start += size
    layout = moe_align_block_size(launch, ids, block_m, experts, workspace=parts[3], out=(parts[0], parts[1], parts[2]))
    gate_up = parts[4].view(x.dtype)[: pairs * width].view(pairs, width)
    middle = parts[5].view(x.dtype)[: pairs * (width // 2)].view(pairs, width // 2)
    return layout, gate_up, middle, parts[6].view(torch.float32)[: pairs * hidden].view(pairs, hidden)


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


def combine(launch: Launch, y: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write, for each token, the weighted sum of the rows of `y` [T * k, H] of its pairs to `out`."""
    tokens, hidden = out.shape
    sums = {"H": hidden, "TOP_K": weights.shape[1], "OUT_STRIDE": out.stride(0), "BLOCK": _COMBINE}
    launch(_combine, (tokens, triton.cdiv(hidden, _COMBINE)), y, weights, out, **sums)
    return out


def many_tokens(
    launch: Launch, x: Tensor, ids: Tensor, experts: int, w13: Callable[[], Tensor], w2: Callable[[], Tensor]
) -> Tensor:
    """Return the outputs of all pairs by torch's grouped product, whose groups need no padding.

    `w13` and `w2` make [E, H, 2F] and [E, F, H], one after the other, so that two of a layer need not exist at once.
    """
    order, expert_of, _ = moe_align_block_size(launch, ids, 1, experts)
    ends = torch.searchsorted(
        expert_of, torch.arange(experts, dtype=torch.int32, device=x.device), right=True, out_int32=True
    )
    rows = x.index_select(0, order // ids.shape[1])
    middle = silu_and_mul(launch, _grouped_mm(rows, w13(), ends))
    y = _grouped_mm(middle, w2(), ends)
    return torch.empty_like(y).index_copy_(0, order.long(), y)


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Under its public name from torch 2.13 on, before under a private one."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    result: Tensor = product(a, b, offs=ends)
    return result
