"""`unified_attention`: o = softmax(q k^T * scale + mask) v over a paged cache, for rows of prompts and decodes alike.

Of q [T, Hq, D]; each q head reads the K and V of its kv head (Ainslie et al. 2023), each query the keys up to its own
position, or the last `window` of them. With a softcap c, scores s become c * tanh(s / c) (Gemma 2); a sink is one more
logit that has no value (gpt-oss). Sums are kept as in FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, E4M3, FLOATS, FP16, FP32, Bound, Case, Maker, Spec, lay_keys
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

_OP = "unified_attention"


def _case(
    what: str,
    heads: Heads,
    lens: Sequence[int],
    q_lens: Sequence[int],
    options: Options = PLAIN,
) -> Case:
    scale = heads.dim**-0.5

    def bind(ops: Ops, make: Maker) -> Bound:
        case = paged(make, heads, lens, q_lens, options)
        out = make.poison(*case.q.shape, dtype=options.dtype)
        sinks = make.randn(heads.q, dtype=options.dtype) if options.sinks else None
        arguments, k_cache = options.arguments(make), lay_keys(ops, case.k_cache)

        def run() -> object:
            return ops.unified_attention(
                case.q, k_cache, case.v_cache, case.cu_seqlens_q, case.seq_lens, case.block_table,
                max_seqlen_q=case.max_seqlen_q, scale=scale, sinks=sinks, out=out, **arguments,
            )  # fmt: skip

        return Bound(run, {"out": out}, lambda: {"out": case.attention(scale, options, sinks)})

    return case_of(_OP, f"{what} {heads} {options}", bind, options)


def _far() -> Case:
    heads = Heads(1, 1, 128)

    def bind(ops: Ops, make: Maker) -> Bound:
        cache, table, lens = far_cache(make, heads)
        q, out = make.randn(1, 1, heads.dim, dtype=BF16), make.poison(1, 1, heads.dim, dtype=BF16)
        cu = make.tensor([0, 1], lens.dtype)

        def run() -> object:
            return ops.unified_attention(q, cache, cache, cu, lens, table, max_seqlen_q=1, scale=0.1, out=out)

        return Bound(run, {"out": out}, lambda: {"out": attend(q, cache[-1], cache[-1], 0.1)})

    return Case(_OP, "past 2^31 elements", bind, gibibytes=5)


def _small() -> list[Case]:
    # Padding, decode rows, a whole prompt, a chunk, a sequence that has no part in this step.
    mixed = ([0, 1, 15, 16, 17, 33, 40, 20], [1, 1, 1, 1, 1, 33, 17, 0])
    few = ([17, 33], [1, 9])
    groups = [Heads(*heads, 64, 16) for heads in ((6, 2), (2, 2), (4, 1), (7, 1), (8, 1))]
    found = [_case("mixed", heads, *mixed, Options(dtype)) for heads in groups for dtype in (BF16, FP32)]
    found += [_case("others", heads, *few, Options(FP32)) for heads in SMALL_SHAPES]
    found += [
        _case("few", Heads(4, 2, dim, 16), *few, Options(dtype)) for dim in (64, 96, 128, 256) for dtype in FLOATS
    ]
    for page in (16, 32, 64):  # key tiles of 32 and of 64: parts of a page, a page, several
        lens, q_lens = [page - 1, page, page + 1, 2 * page + 1], [1, page, 3, 1]
        found += [_case("around a page", Heads(2, 1, 64, page), lens, q_lens, Options(dtype)) for dtype in (BF16, FP32)]
    left = ([0, 1, 17, 70, 90], [1, 1, 1, 40, 30])
    found += [_case("left", Heads(2, 1, 64, 16), *left, Options(FP32, window=w)) for w in (1, 7, 16, 33, 100)]
    found += [_case("left", Heads(2, 1, 64, 64), *left, Options(BF16, window=w)) for w in (1, 63, 64, 65)]
    capped = ([0, 1, 33, 20], [1, 1, 33, 5])
    found += [
        _case("capped", Heads(6, 2, 64, 16), *capped, Options(FP32, window=window, softcap=softcap, sinks=sinks))
        for window, softcap in ((0, 2.0), (9, 0.0), (9, 2.0))
        for sinks in (False, True)
    ]
    found.append(_case("sinks", Heads(6, 2, 64, 16), *capped, Options(FP32, sinks=True)))
    e4m3 = Options(BF16, E4M3)
    found += [
        _case("codes", Heads(6, 2, 64, 16), [0, 17, 33], [1, 1, 20], replace(e4m3, dtype=d)) for d in (BF16, FP32)
    ]
    return found


_STEP = ([1, 700, *(100 + 13 * i for i in range(62))], [1, 400, *[1] * 62])  # a chunk of a prompt among decodes
_ROWS = (_STEP[0], [1] * 64)


def _large() -> list[Case]:
    mixed = (LENS, [1, 1, 15, 1, 17, 63, 64, 1, 3, 700, 1, 0, 40])
    return [
        _far(),
        *(_case("mixed", heads, *mixed) for heads in SHAPES),
        _case("mixed", LLAMA, *mixed, Options(FP16)),
        _case("mixed", Heads(32, 8, 64), *mixed, Options(FP32)),
        _case("mixed", LLAMA, *mixed, Options(window=128)),
        _case("mixed", Heads(16, 8, 256), *mixed, Options(window=512, softcap=50.0)),
        _case("mixed", LLAMA, *mixed, Options(cache_dtype=E4M3)),
        _case("mixed", Heads(9, 3, 64, 16), *mixed, Options(cache_dtype=E4M3)),
        _case("mixed", Heads(64, 8, 64), *mixed, Options(window=128, sinks=True)),
        _case("rows of all lengths", LLAMA, LENS, [1] * len(LENS)),
    ]


SPEC = Spec(
    small=tuple(_small()),
    served=(
        _case("step", LLAMA, *_STEP),  # Llama 3.1 8B, Qwen3 8B, Mixtral 8x7B
        _case("step", Heads(32, 8, 128, 16), *_STEP),
        _case("step", LLAMA, *_STEP, Options(cache_dtype=E4M3)),
        _case("rows", LLAMA, *_ROWS),
        _case("step", Heads(32, 8, 96), *_STEP),
        _case("step", Heads(9, 3, 64), *_STEP),  # SmolLM2 135M
        _case("step", Heads(64, 8, 64), *_STEP, Options(window=128, sinks=True)),  # gpt-oss
        _case("step", Heads(16, 8, 256), *_STEP, Options(window=4096, softcap=50.0)),  # Gemma 2
        _case("step", Heads(4, 1, 256), *_STEP, Options(window=512)),  # Gemma 3 270M
        _case("rows", Heads(4, 1, 256), *_ROWS),
        _case("step", Heads(9, 3, 64), *_STEP, Options(FP32)),
    ),
    large=tuple(_large()),
)
