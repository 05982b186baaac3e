"""Attention for the shapes of the presets: prompts and mixed batches, single rows, and decode in shares."""

import torch
from torch import Tensor

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops
from scalellm.kernels.splits import decode_workspace, num_decode_splits

_BF16, _E4M3, _F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
_SEQS = 64


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _unified(
    name: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    page: int = 64,
    dtype: torch.dtype = _BF16,
    cache_dtype: torch.dtype | None = None,
    max_seqlen_q: int = 2048,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
) -> Case:
    def call(ops: Ops) -> None:
        q = _meta(4096, q_heads, head_dim, dtype=dtype)
        cache = _meta(1000, page, kv_heads, head_dim, dtype=cache_dtype or dtype)
        scale = _meta(1, dtype=torch.float32) if cache_dtype == _E4M3 else None
        ops.unified_attention(
            q,
            cache,
            cache,
            _meta(_SEQS + 1),
            _meta(_SEQS),
            _meta(_SEQS, 512),
            max_seqlen_q=max_seqlen_q,
            scale=0.1,
            window=window,
            softcap=softcap,
            sinks=_meta(q_heads, dtype=_BF16) if sinks else None,
            k_scale=scale,
            v_scale=scale,
            out=_meta(*q.shape, dtype=dtype),
        )

    return Case(f"unified_attention {name}", call, min_sm=89 if cache_dtype == _E4M3 else 80)


def _decode(
    name: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    seqs: int = _SEQS,
    page: int = 64,
    dtype: torch.dtype = _BF16,
    cache_dtype: torch.dtype | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Case:
    def call(ops: Ops) -> None:
        assert ops.launch is not None
        q = _meta(seqs, q_heads, head_dim, dtype=dtype)
        cache = _meta(1000, page, kv_heads, head_dim, dtype=cache_dtype or dtype)
        scale = _meta(1, dtype=torch.float32) if cache_dtype == _E4M3 else None
        splits = num_decode_splits(ops.launch.capability, seqs, kv_heads)
        ops.paged_attention_decode(
            q,
            cache,
            cache,
            _meta(seqs, 512),
            _meta(seqs),
            scale=0.1,
            num_splits=splits,
            window=window,
            softcap=softcap,
            k_scale=scale,
            v_scale=scale,
            workspace=decode_workspace(seqs, q_heads, head_dim, splits, torch.device("meta")),
            out=_meta(*q.shape, dtype=dtype),
        )

    return Case(f"paged_attention_decode {name}", call, min_sm=89 if cache_dtype == _E4M3 else 80)


CASES = (
    _unified("32/8x128", 32, 8, 128),  # Llama 3.1 8B, Qwen3 8B, Mixtral 8x7B
    _unified("32/8x128 page=16", 32, 8, 128, page=16),
    _unified("32/8x128 e4m3", 32, 8, 128, cache_dtype=_E4M3),
    _unified("32/8x128 rows", 32, 8, 128, max_seqlen_q=1),
    _unified("32/8x96", 32, 8, 96),
    _unified("9/3x64", 9, 3, 64),  # SmolLM2 135M
    _unified("64/8x64 window sinks", 64, 8, 64, window=128, sinks=True),  # gpt-oss
    _unified("16/8x256 window softcap", 16, 8, 256, window=4096, softcap=50.0),  # Gemma 2
    _unified("4/1x256 window", 4, 1, 256, window=512),  # Gemma 3 270M
    _unified("4/1x256 rows", 4, 1, 256, max_seqlen_q=1),
    _unified("9/3x64 float32", 9, 3, 64, dtype=_F32),
    _decode("32/8x128", 32, 8, 128),
    _decode("32/8x128 one sequence", 32, 8, 128, seqs=1),
    _decode("32/8x128 page=16", 32, 8, 128, page=16),
    _decode("32/8x128 e4m3", 32, 8, 128, cache_dtype=_E4M3),
    _decode("9/3x64", 9, 3, 64),
    _decode("32/8x96", 32, 8, 96),
    _decode("9/3x64 float32", 9, 3, 64, dtype=_F32),
    _decode("16/8x256 window softcap", 16, 8, 256, window=4096, softcap=50.0),
)
