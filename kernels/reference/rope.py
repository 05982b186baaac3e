"""Rotary position embedding, optional per-head q/k norm, and the write of K and V into the paged cache, in one op."""

import torch
from torch import Tensor

from scalellm.kernels.reference.cache import head_dim_of, to_int8_rows
from scalellm.kernels.reference.norm import rms_norm
from scalellm.kernels.reference.quant import E4M3, to_e4m3


def qk_norm_rope_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    out_q: Tensor | None = None,
) -> Tensor:
    """Split the packed projection, norm and rotate q and k, write k and v into the cache, and return q [T, Hq, D].

    Rotation pairs dimension i with i + D/2 (the NeoX / Hugging Face order), in float32, rounded once at the end.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], heads in the order q, k, v; not modified.
        positions: [T] i64, row of `cos_sin_cache` for each token.
        cos_sin_cache: [P, D] f32; the first half of a row is the cosines, the second half the sines.
        slot_mapping: [T] i64, `block_id * page_size + offset` of each token; -1 writes nothing.
        k_cache: [num_blocks, page_size, Hkv, D], written in place; `v_cache` alike. Of int8, [..., D + 4]: each row of
            a token and head has a scale of its own behind it.
        v_cache: see `k_cache`.
        q_norm: [D] weight of the RMSNorm over each q head (Qwen3, Gemma 3), or None; `k_norm` alike.
        k_norm: see `q_norm`.
        eps: of those norms.
        gemma: those norms take the Gemma form (1 + weight).
        k_scale: for an e4m3 cache, k / k_scale is stored, clamped to +-448; `v_scale` alike. None means 1. What a
            float16 cache stores is clamped to +-65504.
        v_scale: see `k_scale`.
        out_q: [T, Hq, D], receives q.
    """
    kv_heads, head_dim = k_cache.shape[-2], head_dim_of(k_cache)
    heads = qkv.view(qkv.shape[0], qkv.shape[1] // head_dim, head_dim)
    q_heads = heads.shape[1] - 2 * kv_heads
    q, k, v = heads[:, :q_heads], heads[:, q_heads:-kv_heads], heads[:, -kv_heads:]
    if q_norm is None and k_norm is None:
        qk = heads[:, :-kv_heads]
    else:
        q = q if q_norm is None else rms_norm(q, q_norm, eps, gemma=gemma)
        k = k if k_norm is None else rms_norm(k, k_norm, eps, gemma=gemma)
        qk = torch.cat((q, k), dim=1)
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    first, second = qk.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    q, k = rotated[:, :q_heads], rotated[:, q_heads:]

    live = slot_mapping >= 0
    if not bool(live.all()):
        slot_mapping, k, v = slot_mapping[live], k[live], v[live]
    _write(k_cache, slot_mapping, k, k_scale)
    _write(v_cache, slot_mapping, v, v_scale)
    return q if out_q is None else out_q.copy_(q)


def _write(cache: Tensor, slots: Tensor, values: Tensor, scale: float | Tensor | None) -> None:
    page = cache.shape[1]
    if cache.dtype == E4M3:  # scattered as bytes: index_put_ does not know the type
        cache, values = cache.view(torch.uint8), to_e4m3(values, 1.0 if scale is None else scale).view(torch.uint8)
    elif cache.dtype == torch.int8:
        values = to_int8_rows(values)
    elif cache.dtype == torch.float16:
        values = values.float().clamp(-65504, 65504)
    cache.index_put_((slots // page, slots % page), values.to(cache.dtype))
