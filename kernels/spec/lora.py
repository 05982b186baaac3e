"""`lora_shrink` and `lora_expand`: y = s_a (A_a x), and then out += B_a y, with an adapter a of its own for each token.

Of x [T, K], A [adapters, r, K], B [adapters, N, r] (LoRA, Hu et al. 2021; several adapters in a batch: Punica, Chen et
al. 2023). Adapter -1 is none. No model calls these ops yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, FP32, Bound, Case, Maker, Spec, name_of

_ADAPTERS = 4
_OFFSET = 16  # columns of the result before those that are added to
_TOLERANCE = {FP32: 3e-6, BF16: 3e-3}


def _token_lora(make: Maker, tokens: int) -> Tensor:
    adapters = make.randint(-1, _ADAPTERS, tokens, dtype=torch.int32)
    adapters[:2] = make.tensor([0, -1][:tokens], torch.int32)
    return adapters


def _shrink(tokens: int, hidden: int, rank: int, *, dtype: torch.dtype = BF16, scaled: bool = True) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        x, a = make.randn(tokens, hidden, dtype=dtype), make.randn(_ADAPTERS, rank, hidden, dtype=dtype)
        token_lora, scaling = _token_lora(make, tokens), make.rand(_ADAPTERS) + 0.5
        out = make.poison(tokens, rank)

        def expected() -> dict[str, Tensor]:
            chosen = token_lora.clamp(min=0).long()
            y = (a.double()[chosen] @ x.double().unsqueeze(-1)).squeeze(-1)
            if scaled:
                y = y * scaling.double()[chosen].unsqueeze(1)
            return {"out": y * (token_lora >= 0).unsqueeze(1)}

        def run() -> object:
            return ops.lora_shrink(x, a, token_lora, scaling=scaling if scaled else None, out=out)

        return Bound(run, {"out": out}, expected)

    what = f"{tokens}x{hidden} to {rank} {name_of(dtype)}{'' if scaled else ' not scaled'}"
    return Case("lora_shrink", what, bind, dtype, tolerance=1e-4)


def _expand(tokens: int, rank: int, columns: int, *, dtype: torch.dtype = BF16) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        y, b = make.randn(tokens, rank), make.randn(_ADAPTERS, columns, rank, dtype=dtype)
        token_lora, out = _token_lora(make, tokens), make.randn(tokens, columns + 2 * _OFFSET, dtype=dtype)

        def expected() -> dict[str, Tensor]:
            update = (b.double()[token_lora.clamp(min=0).long()] @ y.double().unsqueeze(-1)).squeeze(-1)
            total = out.double()
            total[:, _OFFSET : _OFFSET + columns] += update * (token_lora >= 0).unsqueeze(1)
            return {"out": total}

        return Bound(lambda: ops.lora_expand(y, b, token_lora, out=out, offset=_OFFSET), {"out": out}, expected)

    what = f"{tokens}x{rank} to {columns} {name_of(dtype)}"
    return Case("lora_expand", what, bind, dtype, tolerance=_TOLERANCE[dtype])


SPEC = Spec(
    small=(
        _shrink(5, 600, 9),
        _shrink(5, 40, 4, dtype=FP32, scaled=False),
        _expand(5, 9, 130),
        _expand(5, 4, 24, dtype=FP32),
    ),
    served=(_shrink(64, 4096, 16), _expand(64, 16, 6144)),  # Llama 3.1 8B
    large=(_shrink(1, 14336, 9), _expand(300, 9, 4096)),
)
