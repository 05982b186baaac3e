"""Mixtures of experts in C++. Specified by the torch forms, `kernels.reference.moe`.

Rows are sorted by expert, and those of all experts are multiplied by one call per matrix. A row's result does not
depend on the other rows, and the results of its experts are added up in the order in which they were chosen.
"""

import torch
from torch import Tensor

from scalellm.kernels.cpu.activation import silu_and_mul
from scalellm.kernels.cpu.expert_rows import RowsByExpert
from scalellm.kernels.cpu.gemm_dense import DTYPES, TiledMatrix
from scalellm.kernels.cpu.gemm_wna16 import TiledWeight
from scalellm.kernels.cpu.library import CODES, CpuLibrary
from scalellm.kernels.reference import moe as reference

_MOST_BYTES = 64 << 20  # of gate and up projections that are there at once


class TiledExperts:
    """The gated MLPs of E experts: stacks `w13` of gate and up projections, 2F columns each, and `w2` of H columns."""

    def __init__(
        self, library: CpuLibrary, w13: TiledMatrix | TiledWeight, w2: TiledMatrix | TiledWeight, *, num_experts: int
    ) -> None:
        self._library = library
        self._w13 = w13
        self._w2 = w2
        self._num_experts = num_experts

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return, per token, the weighted sum of its experts' SwiGLU layers, `[T, H]`, in `out` where it is given.

        `x [T, H]`, `weights [T, k]` and `ids [T, k]` as for `kernels.fused_moe`. Many tokens are computed in several
        parts, which takes less memory.

        Raises:
            ValueError: an id is not that of an expert.
        """
        x, weights = x.contiguous(), weights.contiguous()
        out = torch.empty_like(x) if out is None else out
        at_once = max(1, _MOST_BYTES // (ids.shape[1] * self._w13.num_columns * x.element_size()))
        for start in range(0, x.shape[0], at_once):
            part = slice(start, start + at_once)
            self._sum(x[part], weights[part], ids[part], out[part])
        return out

    def _sum(self, x: Tensor, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        rows = RowsByExpert.of(self._library, ids, self._num_experts)
        inner = silu_and_mul(self._library, self._w13.product(x, by_expert=rows, from_tokens=True))
        results = self._w2.product(inner, by_expert=rows)
        pointers = results.data_ptr(), rows.places.data_ptr(), weights.data_ptr(), out.data_ptr()
        self._library.call("sum_of_experts", CODES[x.dtype], *pointers, *ids.shape, x.shape[1])


def topk_softmax(
    library: CpuLibrary,
    router_logits: Tensor,
    k: int,
    renormalize: bool,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """C++ form of `kernels.topk_softmax`; of float32 logits only."""
    rows, experts = router_logits.shape
    if router_logits.dtype != torch.float32 or k > experts or not all(t.is_contiguous() for t in out or ()):
        return reference.topk_softmax(router_logits, k, renormalize, out=out)
    logits = router_logits.contiguous()
    weights, ids = (logits.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int32)) if out is None else out
    pointers = logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
    library.call("topk_softmax", *pointers, rows, experts, k, renormalize)
    return weights, ids


def fused_moe(
    library: CpuLibrary,
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
    """C++ form of `kernels.fused_moe`, for weights of 16 or 32 bits. To use weights repeatedly, make `TiledExperts`."""
    is_dense = w13_scale is None and w2_scale is None and w13.dtype in DTYPES and w2.dtype in DTYPES
    if not is_dense or x.dtype != torch.float32 or not _takes(x, weights, out):
        return reference.fused_moe(x, w13, w2, weights, ids, w13_scale=w13_scale, w2_scale=w2_scale, out=out)
    stacks = (TiledMatrix(library, stack.clone(memory_format=torch.contiguous_format)) for stack in (w13, w2))
    return TiledExperts(library, *stacks, num_experts=w13.shape[0])(x, weights, ids, out=out)


def fused_moe_wna16(
    library: CpuLibrary,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    w13_scales: Tensor,
    w2_scales: Tensor,
    w13_zeros: Tensor | None = None,
    w2_zeros: Tensor | None = None,
    bits: int,
    group_size: int,
    interleave: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.fused_moe_wna16`; inputs are rounded to 8 bits, see `kernels.cpu.gemm_wna16`."""
    reference.check_packed_experts(w13, w2, w13_scales, w2_scales, w13_zeros, w2_zeros, bits, group_size, interleave)
    stacks = ((w13, w13_scales, w13_zeros), (w2, w2_scales, w2_zeros))
    scales_and_zeros = [part for stack in stacks for part in stack[1:] if part is not None]
    alike = all(part.dtype == x.dtype for part in scales_and_zeros)
    tiles = interleave == 1 and TiledWeight.takes(w13_scales, bits=bits, group_size=group_size)
    if not alike or not _takes(x, weights, out) or not tiles:
        return reference.fused_moe_wna16(
            *(x, w13, w2, weights, ids),
            w13_scales=w13_scales,
            w2_scales=w2_scales,
            w13_zeros=w13_zeros,
            w2_zeros=w2_zeros,
            bits=bits,
            group_size=group_size,
            interleave=interleave,
            out=out,
        )
    tiled = (TiledWeight.of_copies(library, *stack, bits=bits, group_size=group_size) for stack in stacks)
    return TiledExperts(library, *tiled, num_experts=w13.shape[0])(x, weights, ids, out=out)


def _takes(x: Tensor, weights: Tensor, out: Tensor | None) -> bool:
    return weights.dtype == torch.float32 and (out is None or (out.dtype == x.dtype and out.is_contiguous()))
