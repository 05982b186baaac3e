"""Mixture of experts: routing, the block layout of the grouped product, and the layer itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from scalellm.kernels.reference.activation import silu_and_mul
from scalellm.kernels.reference.quant import dequantise
from scalellm.kernels.reference.w4a16 import check_shapes, dequantise_packed


def topk_softmax(
    router_logits: Tensor, k: int, renormalize: bool, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k most probable experts of each token: (weights [T, k] f32, ids [T, k] i32), most probable first.

    `router_logits` is [T, E]; the softmax is over all experts, in float32. With `renormalize` the k weights are divided
    by their sum (Mixtral, Qwen3-MoE). Of equal experts the lower id comes first. `out` is (weights, ids).
    """
    probs, order = router_logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, ids = probs[:, :k], order[:, :k].int()
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights, ids) if out is None else (out[0].copy_(weights), out[1].copy_(ids))


def moe_align_block_size(
    ids: Tensor,
    block_size: int,
    num_experts: int,
    *,
    workspace: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out (token, choice) pairs by expert in whole blocks, so that a block of a grouped product has one expert.

    Shapes depend on those of the arguments only, not on the routing, as a captured graph needs. Pair (t, j) of `ids`
    [T, k] is number `t * k + j`. `out` is the three results; `workspace`, i32, is scratch of a device kernel and has no
    effect here.

    Returns:
        sorted_token_ids: [T * k + E * (block_size - 1)] i32, the pairs by expert, ascending within one; each expert's
            stretch, and the end, is filled up with the number T * k.
        expert_ids: [ceil(len(sorted_token_ids) / block_size)] i32, the expert of each block; -1 past the last.
        num_tokens_post_pad: [1] i32, the length of `sorted_token_ids` that is in use, a multiple of block_size.
    """
    flat = ids.flatten().long()
    pairs = flat.numel()
    counts = flat.bincount(minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    padded = blocks * block_size
    by_expert = flat.sort(stable=True)
    rank = torch.arange(pairs, device=ids.device) - (counts.cumsum(0) - counts)[by_expert.values]
    at = (padded.cumsum(0) - padded)[by_expert.values] + rank

    size = pairs + num_experts * (block_size - 1)
    if out is None:
        sorted_token_ids = torch.empty(size, dtype=torch.int32, device=ids.device)
        expert_ids = torch.empty(-(-size // block_size), dtype=torch.int32, device=ids.device)
        num_tokens_post_pad = torch.empty(1, dtype=torch.int32, device=ids.device)
        out = sorted_token_ids, expert_ids, num_tokens_post_pad
    out[0].fill_(pairs)[at] = by_expert.indices.int()
    experts = torch.arange(num_experts, dtype=torch.int32, device=ids.device).repeat_interleave(blocks)
    out[1].fill_(-1)[: len(experts)] = experts
    out[2].fill_(int(padded.sum()))
    return out


def fused_moe(
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
    """Return, per token, the weighted sum of its experts' SwiGLU layers, [T, H]; computed in float32.

    Args:
        x: [T, H].
        w13: [E, 2F, H], the gate rows of each expert first, then its up rows.
        w2: [E, H, F], the down projections.
        weights: [T, k] f32 router weights, and `ids` [T, k] i32 the experts, as `topk_softmax` returns them.
        ids: see `weights`.
        w13_scale: for e4m3 weights, [E, r, c]; each element scales a block of its expert's matrix: r and c divide 2F
            and H ([E, 1, 1] is per expert, [E, 2F, 1] per channel). `w2_scale` alike.
        w2_scale: see `w13_scale`.
        workspace: scratch of a device kernel, i32, of `kernels.fused_moe_workspace_size`; has no effect on the result
            and none here.
        out: [T, H], receives the result.
    """

    def layer(expert: int) -> tuple[Tensor, Tensor]:
        up = dequantise(w13[expert], None if w13_scale is None else w13_scale[expert])
        return up.T, dequantise(w2[expert], None if w2_scale is None else w2_scale[expert]).T

    return _sum_of_experts(x, weights, ids, layer, out)


def fused_moe_wna16(
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
    """As `fused_moe`, with weights of 4 or 8 bits, those of each expert packed as for `w4a16_gemm` or `w8a16_gemm`.

    Args:
        x: [T, H] float32, bfloat16 or float16.
        w13: [E, H / (32 / bits), 2F] i32, the gate columns of each expert first, then its up columns.
        w2: [E, F / (32 / bits), H] i32.
        weights: [T, k] f32 router weights, and `ids` [T, k] i32 the experts, as `topk_softmax` returns them.
        ids: see `weights`.
        w13_scales: [E, H / group_size, 2F]; `w2_scales` is [E, F / group_size, H].
        w2_scales: see `w13_scales`.
        w13_zeros: zero points in the shape of the scales, in units of the packed numbers; None: half their range.
        w2_zeros: see `w13_zeros`.
        bits: 4 or 8.
        group_size: divides H and F.
        interleave: of the words of both matrices, see `w4a16_gemm`; divides H / (32 / bits) and F / (32 / bits).
        workspace: scratch of a device kernel, i32, of `kernels.fused_moe_workspace_size`; has no effect on the result
            and none here.
        out: [T, H], receives the result.

    Raises:
        ValueError: bits is neither 4 nor 8, shapes of scales or zeros do not belong to the weights and group_size, or
            interleave does not divide the words of a column.
    """
    check_packed_experts(w13, w2, w13_scales, w2_scales, w13_zeros, w2_zeros, bits, group_size, interleave)

    def layer(expert: int) -> tuple[Tensor, Tensor]:
        zeros = None if w13_zeros is None else w13_zeros[expert]
        up = dequantise_packed(w13[expert], w13_scales[expert], zeros, bits, group_size, interleave)
        zeros = None if w2_zeros is None else w2_zeros[expert]
        return up, dequantise_packed(w2[expert], w2_scales[expert], zeros, bits, group_size, interleave)

    return _sum_of_experts(x, weights, ids, layer, out)


def check_packed_experts(
    w13: Tensor,
    w2: Tensor,
    w13_scales: Tensor,
    w2_scales: Tensor,
    w13_zeros: Tensor | None,
    w2_zeros: Tensor | None,
    bits: int,
    group_size: int,
    interleave: int,
) -> None:
    """Refuse what `fused_moe_wna16` refuses."""
    if bits not in (4, 8):
        raise ValueError(f"bits: {bits} is neither 4 nor 8")
    check_shapes(w13, w13_scales, w13_zeros, bits, group_size, interleave, prefix="w13_")
    check_shapes(w2, w2_scales, w2_zeros, bits, group_size, interleave, prefix="w2_")


def _sum_of_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    layer: Callable[[int], tuple[Tensor, Tensor]],
    out: Tensor | None,
) -> Tensor:
    """Apply `layer(e)`, the matrices [H, 2F] and [F, H] of an expert in float32, to the tokens of each expert."""
    x32 = x.float()
    total = torch.zeros_like(x32)
    for expert in sorted(set(ids.flatten().tolist())):
        tokens, choice = (ids == expert).nonzero(as_tuple=True)
        up, down = layer(expert)
        result = silu_and_mul(x32[tokens] @ up) @ down
        total.index_add_(0, tokens, result * weights[tokens, choice].float().unsqueeze(1))
    return total.to(x.dtype) if out is None else out.copy_(total)
