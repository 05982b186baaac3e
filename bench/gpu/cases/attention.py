"""Attention over paged caches in which every slot that must not be read holds NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases.case import E4M3, Bound, Case, Maker
from scalellm.kernels import Ops, decode_workspace, num_decode_splits
from scalellm.kernels.splits import decode_tickets

_BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of the heads and pages of a cache."""

    q: int
    kv: int
    dim: int
    page: int = 64


@dataclass(frozen=True, slots=True)
class Paged:
    """Sequences in a cache. `k` and `v` are each sequence's [len, Hkv, D], as the cache has them, in float64."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    q_lens: Sequence[int]
    lens: Sequence[int]
    k: list[Tensor]
    v: list[Tensor]


def paged(
    make: Maker,
    heads: Heads,
    lens: Sequence[int],
    q_lens: Sequence[int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    window: int,
    scales: tuple[float, float],
) -> Paged:
    """Fill a cache; with a window, keys that no query sees are NaN, too."""
    needed = [-(-n // heads.page) for n in lens]
    ids = make.permutation(sum(needed) + 1) + 1  # page 0 stays poison
    shape = (sum(needed) + 2, heads.page, heads.kv, heads.dim)
    k_cache, v_cache = make.poison(*shape, dtype=cache_dtype), make.poison(*shape, dtype=cache_dtype)
    table = torch.zeros(len(lens), max([*needed, 1]) + 2, dtype=torch.int32, device=make.device)
    ks: list[Tensor] = []
    vs: list[Tensor] = []
    taken = 0
    for s, (length, count) in enumerate(zip(lens, needed, strict=True)):
        blocks = ids[taken : taken + count]
        taken += count
        table[s, :count] = blocks.int()
        first = max(0, length - q_lens[s] + 1 - window) if window else 0
        positions = torch.arange(first, length, device=make.device)
        for cache, dense, scale in ((k_cache, ks, scales[0]), (v_cache, vs, scales[1])):
            values = (make.randn(length, heads.kv, heads.dim) / scale).to(cache_dtype)
            slots = blocks[positions // heads.page] * heads.page + positions % heads.page
            _bytes(cache).flatten(0, 1)[slots] = _bytes(values)[first:]
            dense.append(values.double() * scale)
    cu = make.tensor([sum(q_lens[:i]) for i in range(len(q_lens) + 1)], torch.int32)
    q = make.randn(sum(q_lens), heads.q, heads.dim, dtype=dtype)
    return Paged(q, k_cache, v_cache, table, cu, make.tensor(list(lens), torch.int32), q_lens, lens, ks, vs)


def dense_attention(case: Paged, scale: float, window: int, softcap: float, sinks: Tensor | None) -> Tensor:
    """Attend each sequence over its own keys in float64."""
    out = torch.zeros_like(case.q, dtype=torch.float64)
    group = case.q.shape[1] // case.k_cache.shape[2]
    begin = 0
    for s, (length, count) in enumerate(zip(case.lens, case.q_lens, strict=True)):
        rows = slice(begin, begin + count)
        begin += count
        if not length or not count:
            continue
        q = case.q[rows].double().transpose(0, 1)
        k, v = (t[s].transpose(0, 1).repeat_interleave(group, 0) for t in (case.k, case.v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        keys = torch.arange(length, device=q.device)
        queries = torch.arange(length - count, length, device=q.device).unsqueeze(1)
        hidden = keys > queries
        if window:
            hidden |= keys <= queries - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(-1, count, 1)), dim=-1)
        weights = scores.softmax(-1)[..., :length]
        out[rows] = (weights @ v).transpose(0, 1)
    return out


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == E4M3 else t  # indexing does not know the type


def _case(
    op: str,
    what: str,
    heads: Heads,
    lens: Sequence[int],
    q_lens: Sequence[int],
    *,
    dtype: torch.dtype = _BF16,
    cache_dtype: torch.dtype | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    num_splits: int | None = None,
) -> Case:
    scales = (0.5, 0.25) if cache_dtype == E4M3 else (1.0, 1.0)
    scale = heads.dim**-0.5

    def bind(ops: Ops, make: Maker) -> Bound:
        case = paged(make, heads, lens, q_lens, dtype, cache_dtype or dtype, window, scales)
        out = make.poison(*case.q.shape, dtype=dtype)
        sink_logits = make.randn(heads.q, dtype=dtype) if sinks else None
        options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "out": out}
        if cache_dtype == E4M3:
            options |= {
                f"{name}_scale": make.tensor([value], torch.float32) for name, value in zip("kv", scales, strict=True)
            }
        caches = (case.k_cache, case.v_cache)

        def unified() -> object:
            return ops.unified_attention(
                case.q, *caches, case.cu_seqlens_q, case.seq_lens, case.block_table,
                max_seqlen_q=max(q_lens), sinks=sink_logits, **options,
            )  # fmt: skip

        assert ops.launch is not None
        splits = num_splits or num_decode_splits(ops.launch.capability, len(lens), heads.kv)
        workspace = decode_workspace(len(case.q), heads.q, heads.dim, splits, make.device)
        workspace[: -decode_tickets(workspace, len(case.q), heads.q).numel()] = torch.nan

        def decode() -> object:
            return ops.paged_attention_decode(
                case.q, *caches, case.block_table, case.seq_lens, num_splits=splits, workspace=workspace, **options
            )

        run = unified if op == "unified_attention" else decode
        return Bound(run, {"out": out}, lambda: {"out": dense_attention(case, scale, window, softcap, sink_logits)})

    name = f"{heads.q}/{heads.kv}x{heads.dim} page {heads.page} {str(dtype).removeprefix('torch.')} {what}".rstrip()
    min_sm = 89 if cache_dtype == E4M3 else 80
    return Case(op, name, bind, dtype, cache_dtype, min_sm=min_sm)


def _far_cache(op: str, *, tiny: bool) -> Case:
    """A cache of more than 2^31 elements, of which the last block is read."""
    heads = Heads(1, 1, 128, 16 if tiny else 64)

    def bind(ops: Ops, make: Maker) -> Bound:
        blocks = 16_800_000 // heads.page
        cache = torch.empty(blocks, heads.page, 1, heads.dim, dtype=_BF16, device=make.device)
        cache[-1] = make.randn(heads.page, 1, heads.dim, dtype=_BF16)
        q, out = make.randn(1, 1, heads.dim, dtype=_BF16), make.poison(1, 1, heads.dim, dtype=_BF16)
        table, lens = make.tensor([[blocks - 1]], torch.int32), make.tensor([heads.page], torch.int32)
        cu = make.tensor([0, 1], torch.int32)

        def run() -> object:
            if op == "unified_attention":
                return ops.unified_attention(q, cache, cache, cu, lens, table, max_seqlen_q=1, scale=0.1, out=out)
            return ops.paged_attention_decode(q, cache, cache, table, lens, scale=0.1, num_splits=2, out=out)

        def expected() -> dict[str, Tensor]:
            last = cache[-1, :, 0].double()
            return {"out": (torch.softmax(last @ q[0, 0].double() * 0.1, 0) @ last).view(1, 1, -1)}

        return Bound(run, {"out": out}, expected)

    return Case(op, "past 2^31 elements", bind, gibibytes=5)


def cases(*, tiny: bool) -> list[Case]:
    """Lengths 0, 1 and around a page, and long ones; groups 1 to 8; head sizes; windows; softcap; e4m3."""
    unified, decode = "unified_attention", "paged_attention_decode"
    far = [_far_cache(op, tiny=tiny) for op in (unified, decode)]
    if tiny:
        small, mixed, ones = Heads(6, 2, 64, 16), ([0, 17, 20], [1, 1, 20]), ([0, 1, 33], [1, 1, 1])
        return [
            _case(unified, "", small, *mixed),
            _case(unified, "window softcap sinks", small, *mixed, window=9, softcap=5.0, sinks=True),
            _case(unified, "e4m3 cache", small, *mixed, cache_dtype=E4M3),
            _case(decode, "", small, *ones, num_splits=2),
            _case(decode, "e4m3 cache", small, *ones, cache_dtype=E4M3, num_splits=2),
            *far,
        ]
    llama = Heads(32, 8, 128)
    # Padding, decode rows, whole prompts, chunks, a sequence that has no part in this step.
    mixed_lens = [0, 1, 15, 16, 17, 63, 64, 65, 127, 700, 1500, 90, 4000]
    mixed = (mixed_lens, [1, 1, 15, 1, 17, 63, 64, 1, 3, 700, 1, 0, 40])
    ones = (mixed_lens, [1] * len(mixed_lens))
    shapes = (
        llama,
        Heads(8, 8, 128),
        Heads(9, 3, 64, 16),
        Heads(28, 4, 128, 32),
        Heads(8, 1, 128),
        Heads(32, 8, 96),
        Heads(16, 8, 256),
        Heads(4, 1, 256, 16),
    )
    found = list(far)
    for op, (lens, counts) in ((unified, mixed), (decode, ones)):
        found += [_case(op, "", heads, lens, counts) for heads in shapes]
        found += [
            _case(op, "", llama, lens, counts, dtype=torch.float16),
            _case(op, "", Heads(32, 8, 64), lens, counts, dtype=torch.float32),
            _case(op, "window", llama, lens, counts, window=128),
            _case(op, "window softcap", Heads(16, 8, 256), lens, counts, window=512, softcap=50.0),
            _case(op, "e4m3 cache", llama, lens, counts, cache_dtype=E4M3),
            _case(op, "e4m3 cache", Heads(9, 3, 64, 16), lens, counts, cache_dtype=E4M3),
        ]
    found += [
        _case(unified, "window sinks", Heads(64, 8, 64), *mixed, window=128, sinks=True),
        _case(unified, "rows", llama, *ones),
        *(_case(decode, f"splits={n}", llama, *ones, num_splits=n) for n in (1, 4, 64)),
    ]
    return found
