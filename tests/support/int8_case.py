"""Sequences in a cache of 8 bits, and what attention over them is by its definition."""

import torch

from scalellm.kernels.cpu.cache import bytes_shape, can_have_bytes
from scalellm.kernels.reference.cache import from_int8_rows, to_int8_rows
from scalellm.kernels.spec.paged import Options, attend

Q_HEADS, KV_HEADS = 9, 3


class Int8Case:
    """Sequences in a cache in which nothing was written but their tokens, and the numbers that it stands for."""

    def __init__(self, ops, lens, *, page=16, head_dim=64, dtype=torch.float32):
        g = torch.Generator().manual_seed(1)
        needed = [-(-n // page) for n in lens]
        blocks = torch.randperm(sum(needed) + 1, generator=g)
        table = torch.zeros(len(lens), max(needed) + 1, dtype=torch.int32)
        for s, (taken, count) in enumerate(zip(torch.tensor([0, *needed]).cumsum(0).tolist(), needed, strict=False)):
            table[s, :count] = blocks[taken : taken + count]
        self.is_cpp = ops.library is not None and can_have_bytes(page, head_dim)
        rows = (len(blocks), page, KV_HEADS, head_dim)
        shape = bytes_shape(*rows) if self.is_cpp else (*rows[:3], head_dim + 4)
        self.k_cache, self.v_cache = (torch.full(shape, -1, dtype=torch.int8) for _ in range(2))  # scales: no numbers
        slots = [int(table[s, t // page]) * page + t % page for s, n in enumerate(lens) for t in range(n)]
        qkv = torch.randn(len(slots), Q_HEADS + 2 * KV_HEADS, head_dim, generator=g).to(dtype)
        qkv[:, -KV_HEADS:] *= torch.rand(len(slots), KV_HEADS, 1, generator=g) * 4  # scales that differ
        still = torch.cat((torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)), dim=1)
        zeros, slots = torch.zeros(len(slots), dtype=torch.int64), torch.tensor(slots)
        ops.qk_norm_rope_and_cache(qkv.flatten(1), zeros, still, slots, self.k_cache, self.v_cache)
        self.table, self.lens, self.head_dim, self.slots = table, torch.tensor(lens, dtype=torch.int32), head_dim, slots
        self.q, self.k, self.v = qkv[:, :Q_HEADS].float(), qkv[:, Q_HEADS:-KV_HEADS], qkv[:, -KV_HEADS:]
        self.starts = torch.tensor([0, *lens]).cumsum(0).int()

    def prompt(self, ops, **options):
        cache = (self.k_cache, self.v_cache, self.starts, self.lens, self.table)
        options = {"max_seqlen_q": int(self.lens.max()), "scale": self.head_dim**-0.5, **options}
        return ops.unified_attention(self.q, *cache, **options)

    def decode(self, ops, rows, lens, tables, **options):
        cache = (self.k_cache, self.v_cache, tables, torch.as_tensor(lens, dtype=torch.int32))
        return ops.paged_attention_decode(self.q[rows], *cache, scale=self.head_dim**-0.5, **options)

    def dense(self, s):
        """Return keys and values of a sequence as rounding leaves them, `[len, heads, dim]` float64."""
        begin, end = self.starts[s : s + 2].tolist()
        return (from_int8_rows(to_int8_rows(rows[begin:end])).double() for rows in (self.k, self.v))

    def expected(self, *, window=0, softcap=0.0, sinks=None):
        """Return attention of whole prompts by its definition, in float64."""
        options, prompts = Options(window=window, softcap=softcap), self.q.split(self.lens.tolist())
        return torch.cat(
            [attend(q, *self.dense(s), self.head_dim**-0.5, options, sinks) for s, q in enumerate(prompts)]
        )
