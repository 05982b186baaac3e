"""`fused_moe` and `fused_moe_wna16`: y_t = sum over a token's experts e of w_te * down_e(silu(gate_e x_t) * up_e x_t).

Of x [T, H], w13 [E, 2F, H] (gate and up), w2 [E, H, F], and a routing w, ids [T, k] (Mixtral, Jiang et al. 2024).
Weights are in the dtype of x, in e4m3 with float32 scales of outputs or blocks, or integers of 4 or 8 bits in groups
along the inputs. Hidden rows are rounded to the dtype of x; C++ forms round inputs of packed weights as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.reference.moe import topk_softmax
from scalellm.kernels.spec.case import BF16, E4M3, FP16, FP32, Bound, Case, Maker, Spec, name_of
from scalellm.kernels.spec.gemm_fp8 import spread
from scalellm.kernels.spec.gemm_wna16 import PLAIN, pack, rounded_to_bytes, unpacked
from scalellm.kernels.workspaces import WNA16_INTERLEAVE, fused_moe_workspace_size

_TOLERANCE = {FP32: 2e-6, BF16: 1e-2, FP16: 2e-3}  # two products after one another, with a rounding in between


def route(make: Maker, tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    """Return weights and ids of a random routing."""
    return topk_softmax(make.randn(tokens, experts) * 2, k, True)


@dataclass(frozen=True, slots=True)
class Experts:
    """Shape of a layer of experts: their number, how many of them a token has, and the widths."""

    count: int
    k: int
    hidden: int
    inner: int

    def __str__(self) -> str:
        return f"{self.k} of {self.count} {self.hidden}x{self.inner}"

    def workspace(self, make: Maker, tokens: int) -> Tensor:
        """Return poisoned scratch."""
        size = fused_moe_workspace_size(tokens, self.k, self.count, 2 * self.inner, self.hidden)
        return make.poison(size, dtype=torch.int32)

    def exact(
        self,
        x: Tensor,
        up: Callable[[int], Tensor],
        down: Callable[[int], Tensor],
        weights: Tensor,
        ids: Tensor,
        as_input: Callable[[Tensor], Tensor] = Tensor.double,
    ) -> Tensor:
        """Compute one expert at a time in float64, from its matrices [H, 2F] and [F, H].

        `as_input` makes float64 inputs of a product of rows, as a form rounds them.
        """
        total = torch.zeros_like(x, dtype=torch.float64)
        for e in range(self.count):
            chosen, choice = (ids == e).nonzero(as_tuple=True)
            if not len(chosen):
                continue
            gate, linear = (as_input(x[chosen]) @ up(e)).chunk(2, -1)
            result = as_input(F.silu(gate) * linear) @ down(e)
            total.index_add_(0, chosen, result * weights[chosen, choice].double().unsqueeze(1))
        return total

    def grouped_by_torch(self, tokens: int, dtype: torch.dtype) -> bool:
        """True if torch multiplies, which allocates: where an expert has 64 rows of bfloat16 on average."""
        return dtype == BF16 and tokens * self.k >= 64 * self.count


_MIXTRAL, _QWEN3 = Experts(8, 2, 4096, 14336), Experts(128, 8, 2048, 768)
_NARROW = Experts(8, 2, 1024, 1792)


def _layer(
    tokens: int,
    experts: Experts,
    *,
    dtype: torch.dtype = BF16,
    blocks: tuple[tuple[int, int], tuple[int, int]] | None = None,
    gibibytes: float = 6,
) -> Case:
    """`blocks` makes weights e4m3: the number of scales, down and across, of an expert's w13 and w2."""
    count, hidden, inner = experts.count, experts.hidden, experts.inner

    def bind(ops: Ops, make: Maker) -> Bound:
        x = make.randn(tokens, hidden, dtype=dtype)
        w13 = make.randn(count, 2 * inner, hidden, dtype=E4M3 if blocks else dtype, scale=1 if blocks else hidden**-0.5)
        w2 = make.randn(count, hidden, inner, dtype=E4M3 if blocks else dtype, scale=1 if blocks else inner**-0.5)
        scales: list[Tensor | None] = [None, None]
        if blocks:
            scales = [make.rand(count, *shape) * 0.1 + 0.01 for shape in blocks]
        weights, ids = route(make, tokens, experts.count, experts.k)
        workspace, out = experts.workspace(make, tokens), make.poison(tokens, hidden, dtype=dtype)

        def full(weight: Tensor, scale: Tensor | None, e: int) -> Tensor:
            return (weight[e].double() if scale is None else spread(weight[e], scale[e])).T

        def expected() -> dict[str, Tensor]:
            return {
                "out": experts.exact(
                    x, lambda e: full(w13, scales[0], e), lambda e: full(w2, scales[1], e), weights, ids
                )
            }

        def run() -> object:
            return ops.fused_moe(
                x, w13, w2, weights, ids, w13_scale=scales[0], w2_scale=scales[1], workspace=workspace, out=out
            )

        return Bound(run, {"out": out}, expected)

    kind = f"e4m3 scales {' and '.join('x'.join(map(str, s)) for s in blocks)} {name_of(dtype)}" if blocks else ""
    what = f"{tokens} to {experts} {kind or name_of(dtype)}"
    return Case(
        "fused_moe",
        what,
        bind,
        dtype,
        min_sm=89 if blocks else 80,
        tolerance=_TOLERANCE[dtype],
        gibibytes=gibibytes,
        allocates=not blocks and experts.grouped_by_torch(tokens, dtype),
    )


def _channels(tokens: int, experts: Experts, *, gibibytes: float = 6) -> Case:
    blocks = ((2 * experts.inner, 1), (experts.hidden, 1))
    return _layer(tokens, experts, blocks=blocks, gibibytes=gibibytes)


def _squares(tokens: int, experts: Experts, edge: int) -> Case:
    shapes = ((2 * experts.inner, experts.hidden), (experts.hidden, experts.inner))
    first, second = ((rows // edge, columns // edge) for rows, columns in shapes)
    return _layer(tokens, experts, blocks=(first, second))


def _packed(
    tokens: int,
    experts: Experts,
    bits: int,
    group_size: int,
    *,
    zeros: bool = False,
    dtype: torch.dtype = BF16,
    gibibytes: float = 6,
    interleave: int = WNA16_INTERLEAVE,
) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        x, out = make.randn(tokens, experts.hidden, dtype=dtype), make.poison(tokens, experts.hidden, dtype=dtype)
        shapes = (experts.hidden, 2 * experts.inner), (experts.inner, experts.hidden)
        q = [make.randint(0, 1 << bits, experts.count, *shape) for shape in shapes]
        words = [pack(t, bits, interleave) for t in q]
        scales: list[Tensor] = []
        points: list[Tensor | None] = []
        for rows, columns in shapes:
            shape = experts.count, rows // group_size, columns
            scales.append(((make.rand(*shape) + 0.5) * 4 / (1 << bits) / rows**0.5).to(dtype))
            points.append((make.rand(*shape) * (1 << bits)).to(dtype) if zeros else None)
        weights, ids = route(make, tokens, experts.count, experts.k)
        workspace = experts.workspace(make, tokens)

        def full(i: int, e: int) -> Tensor:
            point = points[i]
            return unpacked(q[i][e], scales[i][e], None if point is None else point[e], bits)

        def expected() -> dict[str, Tensor]:
            as_input: Callable[[Tensor], Tensor] = Tensor.double
            if ops.backends["fused_moe_wna16"] == "cpp" and dtype != FP16 and interleave == PLAIN:
                as_input = functools.partial(rounded_to_bytes, group_size=group_size)
            return {"out": experts.exact(x, lambda e: full(0, e), lambda e: full(1, e), weights, ids, as_input)}

        def run() -> object:
            return ops.fused_moe_wna16(
                x, words[0], words[1], weights, ids, w13_scales=scales[0], w2_scales=scales[1], w13_zeros=points[0],
                w2_zeros=points[1], bits=bits, group_size=group_size, interleave=interleave, workspace=workspace,
                out=out,
            )  # fmt: skip

        return Bound(run, {"out": out}, expected)

    what = f"{tokens} to {experts} {bits} bits groups of {group_size}{' zeros' if zeros else ''} {name_of(dtype)}"
    if interleave == PLAIN:
        what = f"{what} plain"
    return Case(
        "fused_moe_wna16",
        what,
        bind,
        dtype,
        # A number next to half way between two steps of 8 bits may be rounded to either.
        tolerance=1.5 * _TOLERANCE[dtype],
        gibibytes=gibibytes,
        allocates=experts.grouped_by_torch(tokens, dtype),
    )


_FEW, _ODD, _SMALL = Experts(4, 2, 64, 48), Experts(3, 2, 40, 130), Experts(3, 2, 64, 96)
_BOTH = (PLAIN, WNA16_INTERLEAVE)
_WHOLE = 50.0  # GiB: a whole layer of Mixtral, and the wider numbers that it is made from

SPEC = Spec(
    small=(
        *(_layer(tokens, e, dtype=dtype) for tokens, e in ((1, _FEW), (5, _ODD)) for dtype in (BF16, FP32, FP16)),
        _layer(100, Experts(3, 2, 32, 48), dtype=FP16),  # blocks of many rows
        *(
            _layer(4, Experts(3, 2, 64, 48), blocks=blocks)
            for blocks in (((96, 1), (64, 1)), ((1, 1), (1, 1)), ((3, 4), (2, 3)))
        ),
        *(
            _packed(4, _SMALL, bits, group, zeros=zeros, dtype=dtype, interleave=PLAIN)
            for bits, group, dtype in ((4, 32, BF16), (8, 32, BF16), (4, 16, FP16), (8, 32, FP32))
            for zeros in (False, True)
        ),
        # A scale for a tile, and columns and rows left over.
        *(_packed(2, Experts(2, 2, 128, 384), bits, 128, zeros=True, interleave=n) for bits in (4, 8) for n in _BOTH),
        *(_packed(2, Experts(3, 2, 40, 80), bits, 40, interleave=PLAIN) for bits in (4, 8)),
        _packed(100, _SMALL, 4, 32, zeros=True, dtype=FP16, interleave=PLAIN),
        # A group is narrower than the words that are interleaved, or as wide.
        _packed(4, Experts(3, 2, 128, 256), 4, 8, dtype=FP32),
        _packed(70, Experts(3, 2, 128, 256), 4, 64, zeros=True, dtype=FP16),
        _packed(4, Experts(3, 2, 64, 192), 8, 32, dtype=FP32),
    ),
    served=(
        *(_layer(tokens, _MIXTRAL, gibibytes=_WHOLE) for tokens in (16, 64, 240, 1024)),
        *(_channels(tokens, _MIXTRAL, gibibytes=_WHOLE) for tokens in (16, 64, 1024)),
        _layer(1024, _MIXTRAL, dtype=FP16, gibibytes=_WHOLE),
        _layer(64, _QWEN3),
        _squares(64, _QWEN3, 128),
        *(_packed(tokens, _MIXTRAL, 4, 128, zeros=True, gibibytes=_WHOLE) for tokens in (16, 64, 1024)),
        _packed(64, _MIXTRAL, 8, 128, gibibytes=_WHOLE),
        *(_packed(tokens, _MIXTRAL, 4, 32, gibibytes=_WHOLE) for tokens in (16, 64)),
        _packed(16, _MIXTRAL, 4, 128, zeros=True, gibibytes=_WHOLE, interleave=PLAIN),
        *(_packed(1024, _MIXTRAL, 4, group, dtype=FP16, gibibytes=_WHOLE) for group in (128, 32)),
        _packed(64, _QWEN3, 4, 128),
    ),
    large=(
        *(_layer(tokens, _NARROW) for tokens in (1, 33, 300, 1024)),
        *(_channels(tokens, _NARROW) for tokens in (1, 64, 1024)),
        _layer(1, _QWEN3),
        _layer(9, _NARROW, dtype=FP16),
        *(_packed(tokens, _NARROW, 4, 128) for tokens in (1, 64, 1024)),
        _packed(9, _NARROW, 8, 128),
        _packed(9, _NARROW, 4, 128, dtype=FP16),
        _packed(64, _QWEN3, 4, 32),
    ),
)
