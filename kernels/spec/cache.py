"""`copy_blocks_` and `swap_blocks`: block t of a cache becomes block s, for pairs (s, t), all sources being read first.

Of caches [num_blocks, page, Hkv, D]: a copy on write within one, and a move between a device and the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, E4M3, FP16, FP32, META, Bound, Case, Maker, Spec, name_of

_SHAPE = (64, 8, 128)
_Shape = tuple[int, int, int]


def _copy(count: int, dtype: torch.dtype = BF16, shape: _Shape = _SHAPE) -> Case:
    """Half the sources are targets, too."""

    def bind(ops: Ops, make: Maker) -> Bound:
        blocks = 2 * max(count, 1)
        k, v = (make.randn(blocks, *shape).to(dtype) for _ in range(2))
        sources, targets = make.permutation(blocks)[:count], make.permutation(blocks)[:count]
        pairs = torch.stack((sources, targets), dim=1)

        def expected() -> dict[str, Tensor]:
            found = {}
            for name, cache in (("k", k), ("v", v)):
                order = torch.arange(blocks, device=make.device)
                order[targets] = sources
                found[name] = cache.view(torch.uint8)[order].view(dtype)
            return found

        return Bound(lambda: ops.copy_blocks_(k, v, pairs), {"k": k, "v": v}, expected)

    name = f"{count} of {name_of(dtype)} {'x'.join(map(str, shape))}"
    return Case("copy_blocks_", name, bind, tolerance=0.0, min_sm=89 if dtype == E4M3 else 80)


def _swap(count: int, shape: _Shape = _SHAPE) -> Case:
    """To host memory, as a preempted sequence goes."""

    def bind(ops: Ops, make: Maker) -> Bound:
        src = make.randn(2 * count, *shape, dtype=BF16)
        dst = torch.full((count, *shape), torch.nan, dtype=BF16, device=META if make.device == META else None)
        sources, targets = make.permutation(2 * count)[:count], make.permutation(count)
        pairs = torch.stack((sources, targets), dim=1)

        def expected() -> dict[str, Tensor]:
            whole = torch.empty(count, *shape, dtype=torch.float64)
            whole[targets.cpu()] = src[sources].cpu().double()
            return {"dst": whole}

        return Bound(lambda: ops.swap_blocks(src, dst, pairs), {"dst": dst}, expected)

    return Case("swap_blocks", f"{count} of bfloat16 {'x'.join(map(str, shape))} to the host", bind, tolerance=0.0)


SPEC = Spec(
    small=(
        *(_copy(4, dtype, (16, 2, 8)) for dtype in (BF16, FP32, FP16, E4M3)),
        *(_copy(count, FP32, (16, 1, 2)) for count in (0, 1, 16, 17, 256, 257)),
        _swap(3, (16, 2, 8)),
    ),
    served=(_copy(4), _copy(100)),
    large=(
        *(_copy(count) for count in (1, 16, 257)),
        _copy(33, E4M3),
        _copy(33, FP32),
        _swap(40),
    ),
)
