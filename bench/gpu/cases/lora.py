"""Adapters, a different one for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.cases.case import Bound, Case, Maker
from scalellm.kernels import Ops

_BF16, _ADAPTERS = torch.bfloat16, 4


def _token_lora(make: Maker, tokens: int) -> Tensor:
    return make.randint(-1, _ADAPTERS, tokens, dtype=torch.int32)


def _shrink(tokens: int, hidden: int, rank: int) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        x, a = make.randn(tokens, hidden, dtype=_BF16), make.randn(_ADAPTERS, rank, hidden, dtype=_BF16)
        token_lora, scaling = _token_lora(make, tokens), make.rand(_ADAPTERS) + 0.5
        out = make.poison(tokens, rank)

        def expected() -> dict[str, Tensor]:
            chosen = token_lora.clamp(min=0).long()
            y = (a.double()[chosen] @ x.double().unsqueeze(-1)).squeeze(-1) * scaling.double()[chosen].unsqueeze(1)
            return {"out": y * (token_lora >= 0).unsqueeze(1)}

        return Bound(lambda: ops.lora_shrink(x, a, token_lora, scaling=scaling, out=out), {"out": out}, expected)

    return Case("lora_shrink", f"{tokens}x{hidden} to {rank}", bind, tolerance=1e-4)


def _expand(tokens: int, rank: int, columns: int) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        y, b = make.randn(tokens, rank), make.randn(_ADAPTERS, columns, rank, dtype=_BF16)
        token_lora, out = _token_lora(make, tokens), make.randn(tokens, columns + 32, dtype=_BF16)

        def expected() -> dict[str, Tensor]:
            update = (b.double()[token_lora.clamp(min=0).long()] @ y.double().unsqueeze(-1)).squeeze(-1)
            total = out.double()
            total[:, 16 : 16 + columns] += update * (token_lora >= 0).unsqueeze(1)
            return {"out": total}

        return Bound(lambda: ops.lora_expand(y, b, token_lora, out=out, offset=16), {"out": out}, expected)

    return Case("lora_expand", f"{tokens}x{rank} to {columns}", bind)


def cases(*, tiny: bool) -> list[Case]:
    """Rank 16, and one that is no power of two: no model calls these ops yet."""
    if tiny:
        return [_shrink(5, 40, 9), _expand(5, 9, 24)]
    return [_shrink(64, 4096, 16), _shrink(1, 14336, 9), _expand(64, 16, 6144), _expand(300, 9, 4096)]
