"""Norm, rotation and cache write for the shapes of the presets."""

import torch

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops

_BF16, _E4M3 = torch.bfloat16, torch.float8_e4m3fn


def _rope(
    name: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    norm: bool = False,
    gemma: bool = False,
    cache_dtype: torch.dtype = _BF16,
) -> Case:
    def call(ops: Ops) -> None:
        cache = torch.empty(1000, 64, kv_heads, head_dim, dtype=cache_dtype, device="meta")
        weight = torch.empty(head_dim, dtype=_BF16, device="meta") if norm else None
        scale = torch.empty(1, device="meta") if cache_dtype == _E4M3 else None
        indices = torch.empty(64, dtype=torch.int64, device="meta")
        ops.qk_norm_rope_and_cache(
            torch.empty(64, (q_heads + 2 * kv_heads) * head_dim, dtype=_BF16, device="meta"),
            indices,
            torch.empty(8192, head_dim, device="meta"),
            indices,
            cache,
            cache,
            q_norm=weight,
            k_norm=weight,
            gemma=gemma,
            k_scale=scale,
            v_scale=scale,
            out_q=torch.empty(64, q_heads, head_dim, dtype=_BF16, device="meta"),
        )

    return Case(f"qk_norm_rope_and_cache {name}", call, min_sm=89 if cache_dtype == _E4M3 else 80)


CASES = (
    _rope("32/8x128", 32, 8, 128),  # Llama 3.1 8B, Mixtral 8x7B
    _rope("32/8x128 e4m3", 32, 8, 128, cache_dtype=_E4M3),
    _rope("32/8x128 norm", 32, 8, 128, norm=True),  # Qwen3 8B
    _rope("32/8x128 norm e4m3", 32, 8, 128, norm=True, cache_dtype=_E4M3),
    _rope("9/3x64", 9, 3, 64),  # SmolLM2 135M
    _rope("4/1x256 gemma", 4, 1, 256, norm=True, gemma=True),  # Gemma 3 270M
)
