"""Low-rank adapters (LoRA, Hu et al. 2021), a different one for each token of a batch (Punica, S-LoRA).

    y = scaling[l] * x A_l^T,    out += y B_l^T,    with l the adapter of the token

No model calls these ops yet: the server does not load adapters. They are kept, with few tests and untimed, for the
projections of a model that has them.
"""

import torch
from torch import Tensor


def lora_shrink(
    x: Tensor, a: Tensor, token_lora: Tensor, *, scaling: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return `scaling[l] * (x @ a[l].T)`, [T, R] f32, with l the adapter of the token; tokens without one get zeros.

    Args:
        x: [T, H].
        a: [L, R, H], the A matrices; adapters of a lower rank are padded with zero rows.
        token_lora: [T] i32, row of `a` for each token; -1 is none.
        scaling: [L] f32 (alpha / rank of each adapter); None is 1.
        out: [T, R] f32, receives the result.
    """
    out = x.new_zeros(x.shape[0], a.shape[1], dtype=torch.float32) if out is None else out.zero_()
    for adapter, tokens in _tokens_by_adapter(token_lora):
        y = x[tokens].float() @ a[adapter].float().T
        out[tokens] = y if scaling is None else y * scaling[adapter]
    return out


def lora_expand(y: Tensor, b: Tensor, token_lora: Tensor, *, out: Tensor, offset: int = 0) -> Tensor:
    """Add `y @ b[l].T` to columns `offset:offset + N` of `out`, the output of the base layer; returns `out`.

    Args:
        y: [T, R] f32, from `lora_shrink`.
        b: [L, N, R], the B matrices, with zero columns where A has zero rows.
        token_lora: [T] i32, row of `b` for each token; -1 is none, and leaves its row of `out` as it is.
        out: [T, >= offset + N], changed in place. The sum is formed in float32 and rounded once.
        offset: first column, for one part of a packed projection (q, k or v; gate or up).

    Raises:
        ValueError: the columns do not fit in `out`.
    """
    end = offset + b.shape[1]
    if end > out.shape[1]:
        raise ValueError(f"offset: columns {offset} to {end} do not fit in the {out.shape[1]} of out")
    for adapter, tokens in _tokens_by_adapter(token_lora):
        update = y[tokens].float() @ b[adapter].float().T
        out[tokens, offset:end] = (out[tokens, offset:end].float() + update).to(out.dtype)
    return out


def _tokens_by_adapter(token_lora: Tensor) -> list[tuple[int, Tensor]]:
    return [
        (adapter, (token_lora == adapter).nonzero().flatten())
        for adapter in sorted(set(token_lora.tolist()))
        if adapter >= 0
    ]
