"""Rotation and cache write in C++. Specified by the torch form, `kernels.reference.rope`."""

import torch
from torch import Tensor

from scalellm.kernels.cpu.cache import MAX_HEAD_DIM, cache_sizes, has_layout, require_rows
from scalellm.kernels.cpu.library import CODES, LANES, CpuLibrary
from scalellm.kernels.reference import rope as reference


def qk_norm_rope_and_cache(
    library: CpuLibrary,
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
    """C++ form of `kernels.qk_norm_rope_and_cache`; positions and slots out of range are a ValueError."""
    indices, norms = (positions, slot_mapping), (q_norm, k_norm)
    if not _takes(qkv, cos_sin_cache, k_cache, v_cache, out_q, indices, norms):
        require_rows(k_cache, v_cache)
        return reference.qk_norm_rope_and_cache(
            qkv,
            positions,
            cos_sin_cache,
            slot_mapping,
            k_cache,
            v_cache,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            gemma=gemma,
            k_scale=k_scale,
            v_scale=v_scale,
            out_q=out_q,
        )
    num_blocks, page, kv_heads, head_dim = cache_sizes(k_cache)
    tokens, columns = qkv.shape
    q_heads = columns // head_dim - 2 * kv_heads
    if out_q is None:
        out_q = qkv.new_empty(tokens, q_heads, head_dim)
    fault = library.call(
        "qk_norm_rope_and_cache",
        CODES[qkv.dtype],
        CODES[k_cache.dtype],
        qkv.data_ptr(),
        out_q.data_ptr(),
        positions.data_ptr(),
        cos_sin_cache.data_ptr(),
        slot_mapping.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        tokens,
        cos_sin_cache.shape[0],
        num_blocks,
        page,
        q_heads,
        kv_heads,
        head_dim,
        qkv.stride(0),
        out_q.stride(0),
        gemma,
        eps,
        1.0 if k_scale is None else float(k_scale),
        1.0 if v_scale is None else float(v_scale),
    )
    if fault >= 0:
        raise ValueError(
            f"token {fault}: positions {int(positions[fault])} or slot_mapping {int(slot_mapping[fault])} is beyond "
            f"the {cos_sin_cache.shape[0]} positions or the {num_blocks * page} slots there are"
        )
    return out_q


def _takes(
    qkv: Tensor,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out_q: Tensor | None,
    indices: tuple[Tensor, ...],
    norms: tuple[Tensor | None, ...],
) -> bool:
    head_dim = cache_sizes(k_cache).head_dim
    return (
        head_dim % (2 * LANES) == 0
        and head_dim <= MAX_HEAD_DIM
        and qkv.dtype in (torch.float32, torch.bfloat16)
        and qkv.stride(1) == 1
        and cos_sin_cache.dtype == torch.float32
        and cos_sin_cache.is_contiguous()
        and k_cache.dtype in CODES
        and has_layout(k_cache, v_cache)
        and all(i.dtype == torch.int64 and i.is_contiguous() and i.shape[0] == qkv.shape[0] for i in indices)
        and all(norm is None or (norm.dtype == qkv.dtype and norm.is_contiguous()) for norm in norms)
        and (
            out_q is None
            or (out_q.dtype == qkv.dtype and out_q.shape[0] == qkv.shape[0] and out_q.stride()[1:] == (head_dim, 1))
        )
    )
