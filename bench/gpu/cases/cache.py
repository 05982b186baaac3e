"""Copies of cache blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.cases.case import E4M3, Bound, Case, Maker
from scalellm.kernels import Ops

_BF16 = torch.bfloat16


def _copy(count: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Case:
    """A chain: sources that are destinations, too, are read first."""

    def bind(ops: Ops, make: Maker) -> Bound:
        k, v = (make.randn(2 * count, *shape).to(dtype) for _ in range(2))
        sources, targets = make.permutation(2 * count)[:count], make.permutation(2 * count)[:count]
        pairs = torch.stack((sources, targets), dim=1)

        def expected() -> dict[str, Tensor]:
            found = {}
            for name, cache in (("k", k), ("v", v)):
                order = torch.arange(2 * count, device=make.device)
                order[targets] = sources
                found[name] = cache.view(torch.uint8)[order].view(dtype)
            return found

        return Bound(lambda: ops.copy_blocks_(k, v, pairs), {"k": k, "v": v}, expected)

    name = str(dtype).removeprefix("torch.")
    return Case("copy_blocks_", f"{count} of {name}", bind, tolerance=0.0, min_sm=89 if dtype == E4M3 else 80)


def _swap(count: int, shape: tuple[int, ...]) -> Case:
    """To host memory, as a preempted sequence goes."""

    def bind(ops: Ops, make: Maker) -> Bound:
        src = make.randn(2 * count, *shape, dtype=_BF16)
        dst = torch.full((count, *shape), torch.nan, dtype=_BF16)
        sources, targets = make.permutation(2 * count)[:count], make.permutation(count)
        pairs = torch.stack((sources, targets), dim=1)

        def expected() -> dict[str, Tensor]:
            whole = torch.empty(count, *shape, dtype=torch.float64)
            whole[targets.cpu()] = src[sources].cpu().double()
            return {"dst": whole}

        return Bound(lambda: ops.swap_blocks(src, dst, pairs), {"dst": dst}, expected)

    return Case("swap_blocks", f"{count} to the host", bind, tolerance=0.0)


def cases(*, tiny: bool) -> list[Case]:
    """Few and many blocks, of every element size."""
    if tiny:
        return [_copy(3, _BF16, (16, 2, 8)), _swap(3, (16, 2, 8))]
    shape = (64, 8, 128)
    return [
        *(_copy(count, _BF16, shape) for count in (1, 16, 257)),
        _copy(33, E4M3, shape),
        _copy(33, torch.float32, shape),
        _swap(40, shape),
    ]
