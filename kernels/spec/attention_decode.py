"""`paged_attention_decode`: attention as `unified_attention`, of one query for each sequence, in shares of its keys.

Share i gives o_i and the logarithm l_i of its sum of weights; o = sum(exp(l_i - l) o_i), l = log(sum(exp(l_i)))
(FlashDecoding, Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, E4M3, FLOATS, FP16, FP32, Bound, Case, Maker, Spec, capability_of, lay_keys
from scalellm.kernels.spec.paged import (
    LENS,
    LLAMA,
    PLAIN,
    SHAPES,
    SMALL_SHAPES,
    Heads,
    Options,
    attend,
    case_of,
    far_cache,
    paged,
)
from scalellm.kernels.splits import decode_tickets, decode_workspace, num_decode_splits

_OP = "paged_attention_decode"


def _case(
    what: str,
    heads: Heads,
    lens: Sequence[int],
    options: Options = PLAIN,
    num_splits: int | None = None,
) -> Case:
    """`num_splits`: None is what the device's table has for so many heads."""
    scale = heads.dim**-0.5

    def bind(ops: Ops, make: Maker) -> Bound:
        case = paged(make, heads, lens, [1] * len(lens), options)
        out = make.poison(*case.q.shape, dtype=options.dtype)
        splits = num_splits or num_decode_splits(capability_of(ops), heads.kv)
        workspace = decode_workspace(len(lens), heads.q, heads.dim, splits, make.device)
        tickets = decode_tickets(workspace, len(lens), heads.q)
        workspace[: -tickets.numel()] = torch.nan
        arguments, k_cache = options.arguments(make), lay_keys(ops, case.k_cache)

        def run() -> object:
            return ops.paged_attention_decode(
                case.q, k_cache, case.v_cache, case.block_table, case.seq_lens, scale=scale, num_splits=splits,
                workspace=workspace, out=out, **arguments,
            )  # fmt: skip

        def expected() -> dict[str, torch.Tensor]:
            return {"out": case.attention(scale, options), "tickets": torch.zeros_like(tickets)}

        return Bound(run, {"out": out, "tickets": tickets}, expected)

    name = f"{what} {heads} {options}{f' in {num_splits} shares' if num_splits else ''}"
    return case_of(_OP, name, bind, options)


def _far() -> Case:
    heads = Heads(1, 1, 128)

    def bind(ops: Ops, make: Maker) -> Bound:
        cache, table, lens = far_cache(make, heads)
        q, out = make.randn(1, 1, heads.dim, dtype=BF16), make.poison(1, 1, heads.dim, dtype=BF16)

        def run() -> object:
            return ops.paged_attention_decode(q, cache, cache, table, lens, scale=0.1, num_splits=2, out=out)

        return Bound(run, {"out": out}, lambda: {"out": attend(q, cache[-1], cache[-1], 0.1)})

    return Case(_OP, "past 2^31 elements", bind, gibibytes=5)


def _small() -> list[Case]:
    groups = [Heads(*heads, 64, 16) for heads in ((6, 2), (2, 2), (4, 1), (7, 1), (8, 1), (9, 3))]
    lens = [0, 1, 33, 257, 700]  # no share, one, and as many as there may be
    found = [
        _case("few", heads, lens, Options(dtype), splits)
        for heads in groups
        for splits, dtype in ((3, BF16), (1, FP32), (3, FP32), (8, FP32))
    ]
    found += [
        _case("two", Heads(4, 2, dim, 16), [1, 33], Options(dtype), splits)
        for dim in (64, 96, 128, 256)
        for dtype in FLOATS
        for splits in (1, 2)
    ]
    found += [
        _case("others", heads, [17, 300], Options(FP32, window=window, softcap=softcap), 4)
        for heads in SMALL_SHAPES
        for window, softcap in ((0, 0.0), (9, 2.0))
    ]
    for page in (16, 32, 64):
        around = [page - 1, page, page + 1, 2 * page + 1]
        found += [_case("around a page", Heads(2, 1, 64, page), around, Options(dtype), 2) for dtype in (BF16, FP32)]
    left = [0, 1, 17, 130, 400]
    for splits in (1, 4):
        found += [
            _case("left", Heads(2, 1, 64, 16), left, Options(FP32, window=w), splits) for w in (1, 16, 33, 100, 300)
        ]
        found += [_case("left", Heads(2, 1, 64, 64), left, Options(window=w), splits) for w in (1, 64, 65, 300)]
    found += [
        _case("capped", Heads(6, 2, 64, 16), lens, Options(FP32, window=window, softcap=2.0), 4) for window in (0, 16)
    ]
    e4m3 = Options(BF16, E4M3, softcap=3.0)
    found += [
        _case("codes", Heads(6, 2, 64, 16), [0, 17, 300], replace(e4m3, dtype=dtype), 2) for dtype in (BF16, FP32)
    ]
    return found


_STEP = [1, 1000, *(100 + 13 * i for i in range(62))]


def _large() -> list[Case]:
    return [
        _far(),
        *(_case("lengths", heads, LENS) for heads in SHAPES),
        _case("lengths", LLAMA, LENS, Options(FP16)),
        _case("lengths", Heads(32, 8, 64), LENS, Options(FP32)),
        _case("lengths", LLAMA, LENS, Options(window=128)),
        _case("lengths", Heads(16, 8, 256), LENS, Options(window=512, softcap=50.0)),
        _case("lengths", LLAMA, LENS, Options(cache_dtype=E4M3)),
        _case("lengths", Heads(9, 3, 64, 16), LENS, Options(cache_dtype=E4M3)),
        *(_case("lengths", LLAMA, LENS, num_splits=n) for n in (1, 4, 64)),
    ]


SPEC = Spec(
    small=tuple(_small()),
    served=(
        _case("step", LLAMA, _STEP),  # Llama 3.1 8B, Qwen3 8B, Mixtral 8x7B
        _case("one", LLAMA, [1000]),
        _case("step", Heads(32, 8, 128, 16), _STEP),
        _case("step", LLAMA, _STEP, Options(cache_dtype=E4M3)),
        _case("step", Heads(9, 3, 64), _STEP),  # SmolLM2 135M
        _case("step", Heads(32, 8, 96), _STEP),
        _case("step", Heads(9, 3, 64), _STEP, Options(FP32)),
        _case("step", Heads(16, 8, 256), _STEP, Options(window=4096, softcap=50.0)),  # Gemma 2
    ),
    large=tuple(_large()),
)
