"""Norms, activations, rotation with the cache write, and quantisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.cases.case import E4M3, Bound, Case, Maker
from scalellm.kernels import Ops, qk_norm_rope_and_cache

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_E4M3_MAX = 448.0


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, gemma: bool) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.double() + gemma)


def _codes(x: Tensor, scale: float | Tensor) -> Tensor:
    return (x.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(E4M3)


def _token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.float().abs().amax(-1, keepdim=True) / _E4M3_MAX).clamp(min=1e-12)
    return _codes(x, scale), scale


def _norm(
    rows: int,
    width: int,
    *,
    dtype: torch.dtype = _BF16,
    residual: bool = True,
    gemma: bool = False,
    epilogue: str = "",
) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        x, weight = make.randn(rows, width, dtype=dtype), make.randn(width, dtype=dtype)
        stream = make.randn(rows, width, dtype=dtype) if residual else None
        out = make.poison(rows, width, dtype=E4M3 if epilogue else dtype)
        results, options = {"out": out}, {}
        if stream is not None:
            results["residual"] = stream
        if epilogue == "static":
            options["quant_scale"] = make.tensor([0.01], _FP32)
        elif epilogue == "tokens":
            options["token_scale"] = results["token_scale"] = make.poison(rows, 1)

        def expected() -> dict[str, Tensor]:
            hidden = x if stream is None else stream + x
            exact = _rms_norm(hidden.double(), weight, 1e-5, gemma)
            found = {"residual": hidden, "out": exact}
            if epilogue:  # the codes are of the rounded row
                normed = F.rms_norm(hidden.float(), [width], None, 1e-5)
                rounded = (normed * (weight.float() + 1)).to(dtype) if gemma else normed.to(dtype) * weight
                codes, scale = _token_codes(rounded)
                found |= {"out": codes if epilogue == "tokens" else _codes(rounded, 0.01), "token_scale": scale}
            return found

        def run() -> object:
            return ops.fused_add_rms_norm(x, stream, weight, 1e-5, gemma=gemma, out=out, **options)

        return Bound(run, results, expected)

    marks = [_name(dtype), *(["gemma"] if gemma else []), *([] if residual else ["first"]), epilogue]
    # The scale of a row is its largest element's, rounded as that is.
    return Case(
        "fused_add_rms_norm",
        f"{rows}x{width} {' '.join(marks)}".rstrip(),
        bind,
        dtype,
        min_sm=89 if epilogue else 80,
        tolerance=1.5e-2 if epilogue else None,
    )


def _gated(op: str, rows: int, width: int, *, dtype: torch.dtype = _BF16, epilogue: str = "") -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        x = make.randn(rows, 2 * width, dtype=dtype, scale=4.0)
        out = make.poison(rows, width, dtype=E4M3 if epilogue else dtype)
        results, options = {"out": out}, {}
        if epilogue:
            options["token_scale"] = results["token_scale"] = make.poison(rows, 1)

        def expected() -> dict[str, Tensor]:
            gate, up = x.double().chunk(2, -1)
            exact = (F.silu(gate) if op == "silu_and_mul" else F.gelu(gate, approximate="tanh")) * up
            if not epilogue:
                return {"out": exact}
            gate, up = x.float().chunk(2, -1)
            gate = F.silu(gate) if op == "silu_and_mul" else F.gelu(gate, approximate="tanh")
            codes, scale = _token_codes(gate.to(dtype) * up.to(dtype))
            return {"out": codes, "token_scale": scale}

        return Bound(lambda: getattr(ops, op)(x, out=out, **options), results, expected)

    name = f"{rows}x{width} {_name(dtype)} {epilogue}".rstrip()
    return Case(op, name, bind, dtype, min_sm=89 if epilogue else 80, tolerance=1.5e-2 if epilogue else None)


def _rope(
    tokens: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    *,
    dtype: torch.dtype = _BF16,
    cache_dtype: torch.dtype | None = None,
    norm: str = "",
) -> Case:
    page, num_blocks = 16, tokens // 8 + 2

    def bind(ops: Ops, make: Maker) -> Bound:
        qkv = make.randn(tokens, (q_heads + 2 * kv_heads) * dim, dtype=dtype)
        positions = make.randint(0, 4096, tokens)
        inverse = 10000.0 ** (-torch.arange(0, dim, 2, device=make.device) / dim)
        angles = torch.arange(4096, device=make.device).unsqueeze(1) * inverse
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        slots = make.permutation(num_blocks * page)[:tokens]
        slots[::5] = -1
        shape = (num_blocks, page, kv_heads, dim)
        k_cache, v_cache = (make.poison(*shape, dtype=cache_dtype or dtype) for _ in range(2))
        out_q = make.poison(tokens, q_heads, dim, dtype=dtype)
        q_norm, k_norm = (make.randn(dim, dtype=dtype) if norm else None for _ in range(2))
        options: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "gemma": norm == "gemma", "eps": 1e-6}
        if cache_dtype == E4M3:
            options |= {"k_scale": make.tensor([0.05], _FP32), "v_scale": 0.02}

        def expected() -> dict[str, Tensor]:
            if cache_dtype == E4M3:  # codes are of values rounded on the way, as the torch form rounds them
                arguments: list[Any] = [t.cpu().clone() for t in (qkv, positions, cos_sin, slots, k_cache, v_cache)]
                on_cpu: dict[str, Any] = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in options.items()}
                q = qk_norm_rope_and_cache(*arguments, **on_cpu).double()
                named = {"out_q": q, "k_cache": arguments[4], "v_cache": arguments[5]}
                return {name: t.to(make.device) for name, t in named.items()}
            heads = qkv.double().view(tokens, -1, dim)
            cos, sin = cos_sin[positions].double().unsqueeze(1).chunk(2, -1)
            found = {}
            parts = heads.split((q_heads, kv_heads, kv_heads), dim=1)
            for name, part, weight in (("out_q", parts[0], q_norm), ("k_cache", parts[1], k_norm)):
                first, second = _rms_norm(part, weight, 1e-6, norm == "gemma").chunk(2, -1)
                found[name] = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
            found["v_cache"] = parts[2]
            live = slots >= 0
            for name in ("k_cache", "v_cache"):
                whole = torch.full(shape, torch.nan, dtype=torch.float64, device=make.device)
                whole.flatten(0, 1)[slots[live]] = found[name][live]
                found[name] = whole
            return found

        def run() -> object:
            return ops.qk_norm_rope_and_cache(qkv, positions, cos_sin, slots, k_cache, v_cache, out_q=out_q, **options)

        return Bound(run, {"out_q": out_q, "k_cache": k_cache, "v_cache": v_cache}, expected)

    kind = f"{_name(cache_dtype)} cache" if cache_dtype else ""
    what = " ".join(f"{tokens} of {q_heads}/{kv_heads}x{dim} {_name(dtype)} {norm} {kind}".split())
    min_sm = 89 if cache_dtype == E4M3 else 80
    return Case("qk_norm_rope_and_cache", what, bind, dtype, cache_dtype, min_sm=min_sm)


def _quant(rows: int, width: int, *, group_size: int | None = None, static: bool = False) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        x = make.randn(rows, width, dtype=_BF16, scale=30.0)
        q = make.poison(rows, width, dtype=E4M3)
        scale = make.tensor([0.37], _FP32) if static else None
        s = make.poison(rows, width // (group_size or width)) if scale is None else scale.clone()

        def expected() -> dict[str, Tensor]:
            if scale is not None:
                return {"q": _codes(x, scale), "s": scale}
            codes, found = _token_codes(x.view(rows, -1, group_size or width))
            return {"q": codes.view(rows, width), "s": found.squeeze(-1)}

        def run() -> object:
            return ops.scaled_fp8_quant(x, scale, group_size=group_size, out=(q, s))

        return Bound(run, {"q": q, "s": s}, expected)

    kind = "static" if static else f"groups of {group_size}" if group_size else "tokens"
    return Case("scaled_fp8_quant", f"{rows}x{width} {kind}", bind, min_sm=89)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float8_e4m3fn", "e4m3")


def cases(*, tiny: bool) -> list[Case]:
    """Widths of the models and odd ones, all dtypes and epilogues."""
    if tiny:
        return [
            _norm(3, 96),
            _norm(3, 96, gemma=True, residual=False, epilogue="tokens"),
            _gated("silu_and_mul", 3, 40),
            _gated("gelu_tanh_and_mul", 3, 40, epilogue="tokens"),
            _rope(6, 4, 2, 64),
            _rope(6, 4, 2, 64, norm="llama", cache_dtype=E4M3),
            _quant(3, 128),
            _quant(3, 128, group_size=64),
        ]
    return [
        *(_norm(300, width, dtype=dtype) for width in (4096, 576) for dtype in (_BF16, _FP16, _FP32)),
        _norm(7, 1000),
        _norm(1, 8192),
        _norm(64, 4096, residual=False),
        _norm(64, 640, gemma=True),
        _norm(64, 4096, epilogue="static"),
        _norm(300, 4096, epilogue="tokens"),
        *(_gated("silu_and_mul", 300, 14336, dtype=dtype) for dtype in (_BF16, _FP16, _FP32)),
        _gated("silu_and_mul", 7, 1500),
        _gated("silu_and_mul", 1, 28672),
        _gated("silu_and_mul", 300, 14336, epilogue="tokens"),
        _gated("gelu_tanh_and_mul", 300, 2048),
        _gated("gelu_tanh_and_mul", 7, 2048, epilogue="tokens"),
        *(_rope(300, 32, 8, 128, dtype=dtype) for dtype in (_BF16, _FP16, _FP32)),
        _rope(1, 32, 8, 128, norm="llama"),
        _rope(300, 9, 3, 64),
        _rope(300, 32, 8, 96),
        _rope(64, 4, 1, 256, norm="gemma"),
        _rope(300, 32, 8, 128, cache_dtype=E4M3),
        _rope(300, 32, 8, 128, norm="llama", cache_dtype=E4M3),
        _quant(300, 4096),
        _quant(1, 14336),
        _quant(300, 4096, group_size=128),
        _quant(300, 4096, static=True),
    ]
