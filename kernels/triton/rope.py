"""Per-head norm of q and k, rotation, and the write of K and V into the paged cache, in one pass over the input."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.quant import E4M3
from scalellm.kernels.triton.overlap import start_after_the_kernel_before
from scalellm.kernels.triton.quantise import scale_of, to_e4m3


def qk_norm_rope_and_cache(
    launch: Launch,
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
    """See the torch form."""
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and cos_sin_cache.is_contiguous()):
        raise ValueError("k_cache, v_cache, cos_sin_cache: must be contiguous")
    if k_cache.dtype == E4M3:
        launch.capability.require_e4m3("k_cache, v_cache")
    tokens, width = qkv.shape
    kv_heads, head_dim = k_cache.shape[-2:]
    q_heads = width // head_dim - 2 * kv_heads
    if out_q is None:
        out_q = torch.empty(tokens, q_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    padded_group = next_power_of_2(q_heads // kv_heads)
    padded_half = next_power_of_2(head_dim // 2)
    launch(
        _qk_norm_rope_and_cache,
        (tokens, kv_heads),
        qkv,
        positions,
        cos_sin_cache,
        slot_mapping,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        1.0 if k_scale is None else k_scale,
        1.0 if v_scale is None else v_scale,
        out_q,
        eps,
        num_warps=max(1, min(8, padded_group * padded_half // 256)),  # 16 elements of q in a thread
        num_stages=1,
        QKV_STRIDE=qkv.stride(0),
        OUT_STRIDE_T=out_q.stride(0),
        OUT_STRIDE_H=out_q.stride(1),
        KV_HEADS=kv_heads,
        GROUP=q_heads // kv_heads,
        PADDED_GROUP=padded_group,
        HALF=head_dim // 2,
        PADDED_HALF=padded_half,
        GEMMA=gemma,
        E4M3_CACHE=k_cache.dtype == E4M3,
        K_SCALE_IN_MEMORY=isinstance(k_scale, Tensor),
        V_SCALE_IN_MEMORY=isinstance(v_scale, Tensor),
    )
    return out_q


@triton.jit
def _norm(first, second, weight_ptr, dim, live, eps, HALF: tl.constexpr, GEMMA: tl.constexpr, DTYPE: tl.constexpr):
    """RMSNorm of heads [H, 2 * HALF], given and returned as halves in float32, rounded where the families round."""
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
    factor = 1.0 / tl.sqrt_rn(mean + eps)
    weight_first = tl.load(weight_ptr + dim, mask=live, other=0.0).to(tl.float32)[None, :]
    weight_second = tl.load(weight_ptr + HALF + dim, mask=live, other=0.0).to(tl.float32)[None, :]
    first = first * factor[:, None]
    second = second * factor[:, None]
    if GEMMA:
        first = first * (weight_first + 1.0)
        second = second * (weight_second + 1.0)
    else:
        first = first.to(DTYPE).to(tl.float32) * weight_first
        second = second.to(DTYPE).to(tl.float32) * weight_second
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit
def _qk_norm_rope_and_cache(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_scale,
    v_scale,
    out_ptr,
    eps,
    QKV_STRIDE: tl.constexpr,
    OUT_STRIDE_T: tl.constexpr,
    OUT_STRIDE_H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    GEMMA: tl.constexpr,
    E4M3_CACHE: tl.constexpr,
    K_SCALE_IN_MEMORY: tl.constexpr,
    V_SCALE_IN_MEMORY: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: a token's kv head and the q heads that read it."""
    start_after_the_kernel_before(OVERLAPS)
    D: tl.constexpr = 2 * HALF
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    dim = tl.arange(0, PADDED_HALF)
    live = dim < HALF
    # All that does not depend on another load comes first, so that all of it is under way at once.
    position = tl.load(positions_ptr + token)
    slot = tl.load(slots_ptr + token)
    one = tl.arange(0, 1)[:, None]
    mask_kv = (one < 1) & live[None, :]
    at_k = qkv_ptr + token * QKV_STRIDE + (KV_HEADS * GROUP + kv_head) * D + one + dim[None, :]
    k_first = tl.load(at_k, mask=mask_kv, other=0.0).to(tl.float32)
    k_second = tl.load(at_k + HALF, mask=mask_kv, other=0.0).to(tl.float32)
    at_v = at_k + KV_HEADS * D
    v_first = tl.load(at_v, mask=mask_kv)
    v_second = tl.load(at_v + HALF, mask=mask_kv)
    cos = tl.load(cos_sin_ptr + position * D + dim, mask=live, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * D + HALF + dim, mask=live, other=0.0)[None, :]

    row = tl.arange(0, PADDED_GROUP)
    head = kv_head * GROUP + row
    mask = (row < GROUP)[:, None] & live[None, :]
    at = qkv_ptr + token * QKV_STRIDE + (head * D)[:, None] + dim[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if q_norm_ptr is not None:
        first, second = _norm(first, second, q_norm_ptr, dim, live, eps, HALF, GEMMA, DTYPE)
    at_out = out_ptr + token * OUT_STRIDE_T + (head * OUT_STRIDE_H)[:, None] + dim[None, :]
    tl.store(at_out, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(at_out + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)

    if k_norm_ptr is not None:
        k_first, k_second = _norm(k_first, k_second, k_norm_ptr, dim, live, eps, HALF, GEMMA, DTYPE)
    # K is rounded to the dtype of activations before anything else happens to it.
    first = (k_first * cos - k_second * sin).to(DTYPE)
    second = (k_second * cos + k_first * sin).to(DTYPE)
    if E4M3_CACHE:
        k_divisor = scale_of(k_scale, K_SCALE_IN_MEMORY)
        v_divisor = scale_of(v_scale, V_SCALE_IN_MEMORY)
        first = to_e4m3(first.to(tl.float32), k_divisor)
        second = to_e4m3(second.to(tl.float32), k_divisor)
        v_first = to_e4m3(v_first.to(tl.float32), v_divisor)
        v_second = to_e4m3(v_second.to(tl.float32), v_divisor)
    mask_written = mask_kv & (slot >= 0)
    at_cache = (slot * KV_HEADS + kv_head) * D + one + dim[None, :]
    tl.store(k_cache_ptr + at_cache, first.to(k_cache_ptr.dtype.element_ty), mask=mask_written)
    tl.store(k_cache_ptr + at_cache + HALF, second.to(k_cache_ptr.dtype.element_ty), mask=mask_written)
    tl.store(v_cache_ptr + at_cache, v_first.to(v_cache_ptr.dtype.element_ty), mask=mask_written)
    tl.store(v_cache_ptr + at_cache + HALF, v_second.to(v_cache_ptr.dtype.element_ty), mask=mask_written)
