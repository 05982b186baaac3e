"""Mixture of experts: routing, the block layout of the grouped product, and the layer itself."""

import torch
from torch import Tensor

from kernels.reference.activation import silu_and_mul
from kernels.reference.quant import dequantise


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
    x32 = x.float()
    total = torch.zeros_like(x32)
    for expert in sorted(set(ids.flatten().tolist())):
        tokens, choice = (ids == expert).nonzero(as_tuple=True)
        up = dequantise(w13[expert], None if w13_scale is None else w13_scale[expert])
        down = dequantise(w2[expert], None if w2_scale is None else w2_scale[expert])
        result = silu_and_mul(x32[tokens] @ up.T) @ down.T
        total.index_add_(0, tokens, result * weights[tokens, choice].float().unsqueeze(1))
    return total.to(x.dtype) if out is None else out.copy_(total)
