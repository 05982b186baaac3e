"""Attention over the paged cache: decode rows, prompts, and both in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.device import Call
from bench.gpu.roofline import LLAMA_8B, ModelShape, decode_attention, prefill_attention, sum_of
from bench.gpu.workloads.workload import Workload
from scalellm.kernels import Ops, decode_workspace, num_decode_splits
from scalellm.kernels.spec.case import E4M3, Maker

_BF16 = torch.bfloat16
_PAGE = 64
_TARGET = 0.80


def _caches(make: Maker, shape: ModelShape, lens: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return both caches and a block table in which neighbours in a sequence are not neighbours in memory."""
    blocks = [-(-length // _PAGE) for length in lens]
    size = (sum(blocks), _PAGE, shape.kv_heads, shape.head_dim)
    k_cache, v_cache = (make.randn(*size, dtype=dtype) for _ in range(2))
    ids = torch.split(make.permutation(sum(blocks)).int(), blocks)
    return k_cache, v_cache, torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)


def _decode(shape: ModelShape, lens: Sequence[int], cache_dtype: torch.dtype, target: float | None) -> Workload:
    """One query for each sequence; the first one may be longer than the others, which are alike."""
    seqs, context = len(lens), lens[-1]
    cost = sum_of(decode_attention(shape, 1, length, cache_dtype.itemsize) for length in lens)
    heads, dim = shape.q_heads, shape.head_dim
    alike = lens[0] == context

    def bind(ops: Ops, make: Maker) -> Call:
        k_cache, v_cache, table = _caches(make, shape, lens, cache_dtype)
        q, out = make.randn(seqs, heads, dim, dtype=_BF16), make.poison(seqs, heads, dim, dtype=_BF16)
        seq_lens = make.tensor(list(lens), torch.int32)
        assert ops.launch is not None
        splits = num_decode_splits(ops.launch.capability, shape.kv_heads)
        workspace = decode_workspace(seqs, heads, dim, splits, make.device)
        scale = make.tensor([1.0], torch.float32) if cache_dtype == E4M3 else None

        def call() -> object:
            return ops.paged_attention_decode(
                q, k_cache, v_cache, table, seq_lens, scale=dim**-0.5, num_splits=splits,
                k_scale=scale, v_scale=scale, workspace=workspace, out=out,
            )  # fmt: skip

        return call

    def own(make: Maker) -> Call:
        q = make.randn(seqs, heads, 1, dim, dtype=_BF16)
        k, v = (make.randn(seqs, shape.kv_heads, context, dim, dtype=_BF16) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    kind = "e4m3" if cache_dtype == E4M3 else "bf16"
    rows = f"{seqs} x {context}" if alike else f"{lens[0]} beside {seqs - 1} x {context}"
    return Workload(
        "paged_attention_decode",
        f"{heads}/{shape.kv_heads}x{dim} {rows} {kind}",
        cost,
        bind,
        own if alike and cache_dtype == _BF16 else None,
        "SDPA, not paged",
        target,
        cache_dtype,
        min_sm=89 if cache_dtype == E4M3 else 80,
        resident_bytes=cost.num_bytes,
    )


def _prompts(shape: ModelShape, seqs: int, tokens: int, rows: int = 0, context: int = 0) -> Workload:
    """`seqs` whole prompts, and `rows` decode rows of `context` cached tokens each."""
    prompt = prefill_attention(shape, seqs, tokens, 2)
    row = decode_attention(shape, rows, context, 2)
    cost = sum_of((prompt, row))
    heads, dim = shape.q_heads, shape.head_dim

    def bind(ops: Ops, make: Maker) -> Call:
        k_cache, v_cache, table = _caches(make, shape, [tokens] * seqs + [context] * rows, _BF16)
        total = seqs * tokens + rows
        q, out = make.randn(total, heads, dim, dtype=_BF16), make.poison(total, heads, dim, dtype=_BF16)
        lens = make.tensor([tokens] * seqs + [context] * rows, torch.int32)
        counts = [tokens] * seqs + [1] * rows
        cu = make.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], torch.int32)

        def call() -> object:
            return ops.unified_attention(
                q, k_cache, v_cache, cu, lens, table, max_seqlen_q=tokens, scale=dim**-0.5, out=out
            )

        return call

    def own(make: Maker) -> Call:
        q = make.randn(seqs, heads, tokens, dim, dtype=_BF16)
        k, v = (make.randn(seqs, shape.kv_heads, tokens, dim, dtype=_BF16) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    what = f"{heads}/{shape.kv_heads}x{dim} {seqs} x {tokens}{f' + {rows} x {context} decode' if rows else ' prompt'}"
    return Workload(
        "unified_attention", what, cost, bind, None if rows else own, "SDPA, not paged", resident_bytes=cost.num_bytes
    )


def workloads(*, tiny: bool) -> list[Workload]:
    """Heads of Llama-3.1-8B, Qwen3-8B and Mixtral, which are the same."""
    if tiny:
        small = replace(LLAMA_8B, q_heads=4, kv_heads=2, head_dim=64)
        return [
            _decode(small, [70] * 2, _BF16, _TARGET),
            _decode(small, [70], E4M3, None),
            _decode(small, [300, 9], _BF16, None),
            _prompts(small, 1, 20),
            _prompts(small, 1, 20, 2, 30),
        ]
    batches = [[1024] * 64, [32768], [1024], [1024] * 8, [1024] * 256, [100_000, *[1024] * 63]]
    with_target = batches[:2]
    rank = replace(LLAMA_8B, q_heads=8, kv_heads=2)  # of four
    return [
        *(_decode(LLAMA_8B, b, _BF16, _TARGET if b in with_target else None) for b in batches),
        *(_decode(LLAMA_8B, b, E4M3, None) for b in batches),
        _decode(rank, batches[-1], _BF16, None),
        _prompts(LLAMA_8B, 1, 1024),
        _prompts(LLAMA_8B, 1, 8192),
        _prompts(LLAMA_8B, 8, 1024),
        _prompts(LLAMA_8B, 1, 512, 64, 1024),
    ]
