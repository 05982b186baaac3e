"""Routing, the layout by expert, and the expert layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.cases.case import E4M3, Bound, Case, Maker
from bench.gpu.cases.gemm import pack
from scalellm.kernels import Ops, fused_moe_workspace_size, moe_align_block_size, topk_softmax

_BF16 = torch.bfloat16


def route(make: Maker, tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    """Return weights and ids of a random routing."""
    return topk_softmax(make.randn(tokens, experts) * 2, k, True)


def _topk(tokens: int, experts: int, k: int, renormalize: bool) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        logits = make.randn(tokens, experts) * 3
        logits[tokens // 2] = 0.0  # all equal: the lowest ids
        weights, ids = make.poison(tokens, k), make.poison(tokens, k, dtype=torch.int32)

        def expected() -> dict[str, Tensor]:
            exact, order = topk_softmax(logits, k, renormalize)
            return {"weights": exact, "ids": order}

        def run() -> object:
            return ops.topk_softmax(logits, k, renormalize, out=(weights, ids))

        return Bound(run, {"weights": weights, "ids": ids}, expected)

    return Case("topk_softmax", f"{k} of {experts} for {tokens}{' renormalized' if renormalize else ''}", bind)


def _align(tokens: int, experts: int, k: int, block_size: int) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        ids = make.randint(0, experts, tokens, k, dtype=torch.int32)
        exact = moe_align_block_size(ids.cpu(), block_size, experts)
        names = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
        out = tuple(make.poison(*t.shape, dtype=torch.int32) for t in exact)

        def run() -> object:
            return ops.moe_align_block_size(ids, block_size, experts, out=(out[0], out[1], out[2]))

        return Bound(run, dict(zip(names, out, strict=True)), lambda: _on(make, dict(zip(names, exact, strict=True))))

    return Case("moe_align_block_size", f"{tokens}x{k} to {experts} in blocks of {block_size}", bind)


def _on(make: Maker, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(make.device) for name, tensor in tensors.items()}


def _layer(
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    inner: int,
    *,
    dtype: torch.dtype = _BF16,
    block: int | None = None,
    e4m3: bool = False,
) -> Case:
    """With e4m3 weights, `block` is the edge of a scale's square; None is one scale for each output."""

    def bind(ops: Ops, make: Maker) -> Bound:
        x = make.randn(tokens, hidden, dtype=dtype)
        w13, w2 = make.randn(experts, 2 * inner, hidden), make.randn(experts, hidden, inner)
        scales: list[Tensor | None] = [None, None]
        if e4m3:
            w13, w2 = w13.to(E4M3), w2.to(E4M3)
            scales = [
                make.rand(experts, rows // (block or 1), columns // (block or columns)) * 0.1 + 0.01
                for rows, columns in ((2 * inner, hidden), (hidden, inner))
            ]
        else:
            w13, w2 = (w13 * hidden**-0.5).to(dtype), (w2 * inner**-0.5).to(dtype)
        weights, ids = route(make, tokens, experts, k)
        size = fused_moe_workspace_size(tokens, k, experts, 2 * inner, hidden)
        workspace = make.poison(size, dtype=torch.int32)
        out = make.poison(tokens, hidden, dtype=dtype)

        def expected() -> dict[str, Tensor]:
            up, down = ((lambda e, w=w, s=s: _full(w, s, e).T) for w, s in zip((w13, w2), scales, strict=True))
            return {"out": _experts(x, up, down, experts, weights, ids)}

        def run() -> object:
            return ops.fused_moe(
                x, w13, w2, weights, ids, w13_scale=scales[0], w2_scale=scales[1], workspace=workspace, out=out
            )

        return Bound(run, {"out": out}, expected)

    kind = f"e4m3 {f'blocks of {block}' if block else 'channels'}" if e4m3 else str(dtype).removeprefix("torch.")
    what = f"{tokens} to {k} of {experts} {hidden}x{inner} {kind}"
    # Two products after one another, with a rounding of what is between them.
    return Case("fused_moe", what, bind, dtype, min_sm=89 if e4m3 else 80, tolerance=2e-2, gibibytes=6)


def _packed(tokens: int, experts: int, k: int, hidden: int, inner: int, bits: int, group_size: int) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        x, out = make.randn(tokens, hidden, dtype=_BF16), make.poison(tokens, hidden, dtype=_BF16)
        shapes = (hidden, 2 * inner), (inner, hidden)
        q = [make.randint(0, 1 << bits, experts, *shape) for shape in shapes]
        words = [pack(t, bits) for t in q]
        scales = [
            ((make.rand(experts, rows // group_size, columns) + 0.5) * 4 / (1 << bits) / rows**0.5).to(_BF16)
            for rows, columns in shapes
        ]
        weights, ids = route(make, tokens, experts, k)
        size = fused_moe_workspace_size(tokens, k, experts, 2 * inner, hidden)
        workspace = make.poison(size, dtype=torch.int32)

        def full(i: int, e: int) -> Tensor:
            return (q[i][e] - (1 << (bits - 1))) * scales[i][e].double().repeat_interleave(group_size, 0)

        def expected() -> dict[str, Tensor]:
            return {"out": _experts(x, lambda e: full(0, e), lambda e: full(1, e), experts, weights, ids)}

        def run() -> object:
            return ops.fused_moe_wna16(
                x, words[0], words[1], weights, ids, w13_scales=scales[0], w2_scales=scales[1],
                bits=bits, group_size=group_size, workspace=workspace, out=out,
            )  # fmt: skip

        return Bound(run, {"out": out}, expected)

    what = f"{tokens} to {k} of {experts} {hidden}x{inner} {bits} bits groups of {group_size}"
    return Case("fused_moe_wna16", what, bind, tolerance=2e-2, gibibytes=6)


def _experts(
    x: Tensor,
    up: Callable[[int], Tensor],
    down: Callable[[int], Tensor],
    experts: int,
    weights: Tensor,
    ids: Tensor,
) -> Tensor:
    """Compute one expert at a time in float64, from its matrices [H, 2F] and [F, H]."""
    total = torch.zeros_like(x, dtype=torch.float64)
    for e in range(experts):
        chosen, choice = (ids == e).nonzero(as_tuple=True)
        gate, linear = (x[chosen].double() @ up(e)).chunk(2, -1)
        result = (F.silu(gate) * linear) @ down(e)
        total.index_add_(0, chosen, result * weights[chosen, choice].double().unsqueeze(1))
    return total


def _full(weight: Tensor, scale: Tensor | None, e: int) -> Tensor:
    if scale is None:
        return weight[e].double()
    rows, columns = (n // m for n, m in zip(weight.shape[1:], scale.shape[1:], strict=True))
    return weight[e].double() * scale[e].double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def cases(*, tiny: bool) -> list[Case]:
    """Shapes of Mixtral (narrowed) and Qwen3-MoE; one token to a prompt."""
    if tiny:
        return [
            _topk(3, 8, 2, True),
            _align(5, 6, 2, 16),
            _layer(3, 4, 2, 64, 48),
            _layer(3, 4, 2, 64, 64, e4m3=True, block=32),
            _packed(3, 4, 2, 64, 64, 4, 32),
        ]
    return [
        *(_layer(tokens, 8, 2, 1024, 1792) for tokens in (1, 33, 300, 1024)),
        *(_layer(tokens, 8, 2, 1024, 1792, e4m3=True) for tokens in (1, 64, 1024)),
        *(_layer(tokens, 128, 8, 2048, 768) for tokens in (1, 64)),
        _layer(64, 128, 8, 2048, 768, e4m3=True, block=128),
        _layer(9, 8, 2, 1024, 1792, dtype=torch.float16),
        *(_packed(tokens, 8, 2, 1024, 1792, 4, 128) for tokens in (1, 64, 1024)),
        _packed(9, 8, 2, 1024, 1792, 8, 128),
        _packed(64, 128, 8, 2048, 768, 4, 32),
        *(_topk(tokens, *shape) for tokens in (1, 300) for shape in ((8, 2, True), (128, 8, True), (60, 4, False))),
        *(_align(tokens, experts, k, 16) for tokens, experts, k in ((1, 8, 2), (64, 8, 2), (300, 128, 8))),
        _align(4096, 128, 8, 64),
    ]
