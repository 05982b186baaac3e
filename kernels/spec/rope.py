"""`qk_norm_rope_and_cache`: q, k = R(p) norm(q, k), and k, v go to their slots of the paged cache.

Of qkv [T, (Hq + 2 Hkv) D]. R(p) turns the pair (x_i, x_{i + D/2}) by the angle p * theta^(-2i/D) (RoPE, Su et al. 2021,
in the order of GPT-NeoX and transformers); norm is RMSNorm over a head (Qwen3, Gemma 3) or nothing. Slot -1 writes
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.reference.rope import qk_norm_rope_and_cache
from scalellm.kernels.spec.case import BF16, E4M3, FLOATS, FP16, FP32, Bound, Case, Maker, Spec, lay_keys, name_of
from scalellm.kernels.spec.norm import rms_norm

# One rounding; behind a norm, two or three.
_TOLERANCE = {FP32: 2e-6, BF16: 3e-3, FP16: 4e-4}
_EPS = 1e-6


def _rope(
    tokens: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    *,
    dtype: torch.dtype = BF16,
    cache_dtype: torch.dtype | None = None,
    norm: str = "",
    page: int = 16,
    spread: float = 1.0,
) -> Case:
    """`norm`: "", "llama", "gemma". `spread` is the size of the inputs: large ones are clamped in an e4m3 cache."""
    num_blocks = 2 * tokens // page + 2
    positions_of_table = 4096

    def bind(ops: Ops, make: Maker) -> Bound:
        qkv = make.randn(tokens, (q_heads + 2 * kv_heads) * dim, dtype=dtype, scale=spread)
        positions = make.randint(0, positions_of_table, tokens)
        inverse = 10000.0 ** (-torch.arange(0, dim, 2, device=make.device) / dim)
        angles = torch.arange(positions_of_table, device=make.device).unsqueeze(1) * inverse
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        slots = make.permutation(num_blocks * page)[:tokens]
        slots[1::5] = -1
        shape = (num_blocks, page, kv_heads, dim)
        k_cache, v_cache = (make.poison(*shape, dtype=cache_dtype or dtype) for _ in range(2))
        k_cache = lay_keys(ops, k_cache)
        out_q = make.poison(tokens, q_heads, dim, dtype=dtype)
        q_norm, k_norm = (make.randn(dim, dtype=dtype) if norm else None for _ in range(2))
        options: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "gemma": norm == "gemma", "eps": _EPS}
        if cache_dtype == E4M3:
            options |= {"k_scale": make.tensor([0.05], FP32), "v_scale": make.tensor([0.02], FP32)}

        def expected() -> dict[str, Tensor]:
            if cache_dtype == E4M3:  # codes are of values rounded on the way, as the torch form rounds them
                plain = k_cache.contiguous()
                arguments: list[Any] = [t.cpu().clone() for t in (qkv, positions, cos_sin, slots, plain, v_cache)]
                on_cpu: dict[str, Any] = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in options.items()}
                q = qk_norm_rope_and_cache(*arguments, **on_cpu)
                named = {"out_q": q.double(), "k_cache": arguments[4], "v_cache": arguments[5]}
                return {name: t.to(make.device) for name, t in named.items()}
            heads = qkv.double().view(tokens, -1, dim)
            cos, sin = cos_sin[positions].double().unsqueeze(1).chunk(2, -1)
            found = {}
            q, k, v = heads[:, :q_heads], heads[:, q_heads:-kv_heads], heads[:, -kv_heads:]
            for name, part, weight in (("out_q", q, q_norm), ("k_cache", k, k_norm)):
                first, second = rms_norm(part, weight, _EPS, norm == "gemma").chunk(2, -1)
                found[name] = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
            found["v_cache"] = v
            live = slots >= 0
            for name in ("k_cache", "v_cache"):
                whole = torch.full(shape, torch.nan, dtype=torch.float64, device=make.device)
                whole.flatten(0, 1)[slots[live]] = found[name][live]
                found[name] = whole
            return found

        def run() -> object:
            return ops.qk_norm_rope_and_cache(qkv, positions, cos_sin, slots, k_cache, v_cache, out_q=out_q, **options)

        return Bound(run, {"out_q": out_q, "k_cache": k_cache, "v_cache": v_cache}, expected)

    marks = (norm, f"{name_of(cache_dtype)} cache" if cache_dtype else "", "clamped" if spread != 1 else "")
    what = " ".join(f"{tokens} of {q_heads}/{kv_heads}x{dim} page {page} {name_of(dtype)} {' '.join(marks)}".split())
    # Of an e4m3 cache, the rows beside it are held to the torch form, which rounds in between as well.
    tolerance = (3 if norm else 1) * (2 if cache_dtype == E4M3 else 1) * _TOLERANCE[dtype]
    return Case(
        "qk_norm_rope_and_cache",
        what,
        bind,
        dtype,
        cache_dtype,
        tolerance,
        min_sm=89 if cache_dtype == E4M3 else 80,
    )


SPEC = Spec(
    small=(
        *(
            _rope(6, *heads, dtype=dtype, norm=norm)
            for heads in ((4, 1, 128), (2, 2, 64), (6, 2, 96), (7, 1, 64), (8, 1, 256), (9, 3, 64))
            for norm in ("", "llama", "gemma")
            for dtype in FLOATS
        ),
        *(
            _rope(6, 4, 2, 64, dtype=dtype, norm=norm, cache_dtype=E4M3, spread=300)
            for norm in ("", "llama")
            for dtype in FLOATS
        ),
    ),
    served=(
        _rope(64, 32, 8, 128, page=64),  # Llama 3.1 8B, Mixtral 8x7B
        _rope(64, 32, 8, 128, page=64, cache_dtype=E4M3),
        _rope(64, 32, 8, 128, page=64, norm="llama"),  # Qwen3 8B
        _rope(64, 32, 8, 128, page=64, norm="llama", cache_dtype=E4M3),
        _rope(64, 9, 3, 64, page=64),  # SmolLM2 135M
        _rope(64, 4, 1, 256, page=64, norm="gemma"),  # Gemma 3 270M
    ),
    large=(
        *(_rope(300, 32, 8, 128, dtype=dtype) for dtype in (BF16, FP16, FP32)),
        _rope(1, 32, 8, 128, norm="llama"),
        _rope(300, 9, 3, 64),
        _rope(300, 32, 8, 96),
        _rope(64, 4, 1, 256, norm="gemma"),
        _rope(300, 32, 8, 128, cache_dtype=E4M3),
        _rope(300, 32, 8, 128, norm="llama", cache_dtype=E4M3),
    ),
)
