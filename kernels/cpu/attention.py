"""Attention over the paged cache in C++. Specified by the torch forms, `kernels.reference.attention`."""

import torch
from torch import Tensor

from scalellm.kernels.cpu.cache import cache_sizes, has_layout, require_rows
from scalellm.kernels.cpu.library import CODES, CpuLibrary
from scalellm.kernels.reference import attention as reference


def unified_attention(
    library: CpuLibrary,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.unified_attention`; a block that the cache does not have is a ValueError."""
    if not _takes(q, k_cache, v_cache, block_table, out):
        require_rows(k_cache, v_cache)
        return reference.unified_attention(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q,
            seq_lens,
            block_table,
            max_seqlen_q=max_seqlen_q,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
        )
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts, seq_lens = cu_seqlens_q.to(torch.int32).contiguous(), seq_lens.to(torch.int32).contiguous()
    logits = None if sinks is None else sinks.float().contiguous()
    fault = library.call(
        "unified_attention",
        *_arguments(q, k_cache, v_cache, block_table, seq_lens, scale, window, softcap, k_scale, v_scale, out),
        starts.data_ptr(),
        None if logits is None else logits.data_ptr(),
        q.shape[0],
    )
    if fault >= 0:
        begin, end = starts[fault : fault + 2].tolist()
        length = int(seq_lens[fault])
        if end - begin > length > 0:
            raise ValueError(f"seq_lens[{fault}] is {length}, less than its {end - begin} query tokens")
        raise _no_such_block(fault, length)
    return out


def paged_attention_decode(
    library: CpuLibrary,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    num_splits: int = 1,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.paged_attention_decode`; a block that the cache does not have is a ValueError."""
    if not _takes(q, k_cache, v_cache, block_table, out):
        require_rows(k_cache, v_cache)
        return reference.paged_attention_decode(
            q,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
        )
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    seq_lens = seq_lens.to(torch.int32).contiguous()
    fault = library.call(
        "paged_attention_decode",
        *_arguments(q, k_cache, v_cache, block_table, seq_lens, scale, window, softcap, k_scale, v_scale, out),
    )
    if fault >= 0:
        raise _no_such_block(fault, int(seq_lens[fault]))
    return out


def _takes(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, out: Tensor | None) -> bool:
    return (
        q.dtype in (torch.float32, torch.bfloat16)
        and k_cache.dtype in CODES
        and has_layout(k_cache, v_cache)
        and _has_whole_rows(q)
        and (out is None or (out.dtype == q.dtype and out.shape == q.shape and _has_whole_rows(out)))
        and block_table.dtype == torch.int32
        and block_table.stride(1) == 1
    )


def _has_whole_rows(heads: Tensor) -> bool:
    return heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]


def _arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int,
    softcap: float,
    k_scale: float | Tensor | None,
    v_scale: float | Tensor | None,
    out: Tensor,
) -> tuple[int | float, ...]:
    """Return the first arguments of both C++ functions."""
    num_blocks, page, kv_heads, head_dim = cache_sizes(k_cache)
    return (
        CODES[q.dtype],
        CODES[k_cache.dtype],
        q.data_ptr(),
        out.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        seq_lens.shape[0],
        block_table.shape[1],
        block_table.stride(0),
        num_blocks,
        page,
        kv_heads,
        q.shape[1] // kv_heads,
        head_dim,
        q.stride(0),
        out.stride(0),
        window,
        scale if k_scale is None else scale * float(k_scale),
        softcap,
        1.0 if v_scale is None else float(v_scale),
    )


def _no_such_block(sequence: int, length: int) -> ValueError:
    return ValueError(f"block_table[{sequence}] has no block of the cache for some of its {length} tokens")
