"""Attention over the paged KV cache: any mix of prompts, prompt chunks and decode rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scalellm.kernels.reference.cache import from_int8_rows, head_dim_of
from scalellm.kernels.reference.quant import E4M3

# Decode rows are gathered in groups of about this many K elements: large enough to hide the cost of a torch call,
# small enough that what was gathered is still in the core's cache when the products read it (measured: 1.3 times
# faster than one gather for all rows at 64 rows of 256 tokens).
_GROUP_ELEMENTS = 1 << 18


def unified_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last tokens of each sequence over its cached keys and values; returns [T, Hq, D].

    The queries of sequence s are rows `cu_seqlens_q[s]:cu_seqlens_q[s + 1]` and stand at the end of the sequence: the
    last one is at position `seq_lens[s] - 1`. Their own K and V are already in the cache. Query head h reads kv head
    `h // (Hq // Hkv)`. Only slots that a query may attend to influence the result; anything, NaN included, may stand
    in the others. Rows of a sequence of length 0, and rows after `cu_seqlens_q[-1]`, are padding and come out zero.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16. Computed in float32.
        k_cache: [num_blocks, page_size, Hkv, D], of any of these dtypes or e4m3, or [..., D + 4] int8 as
            `qk_norm_rope_and_cache` writes it; `v_cache` alike.
        v_cache: see `k_cache`.
        cu_seqlens_q: [S + 1] i32, prefix sums of the numbers of query tokens.
        seq_lens: [S] i32, tokens in the cache including this step's.
        block_table: [S, max_blocks] i32; entries past a sequence's last block are not read.
        max_seqlen_q: largest number of query tokens of a sequence. Sizes the launch of a device kernel; unused here.
        scale: factor on q.k.
        window: a query at position p attends to positions in (p - window, p]; 0 is unlimited.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2); 0 is off.
        sinks: [Hq] per-head logit that takes part in the softmax denominator only (attention sinks, gpt-oss).
        k_scale: stored k times k_scale is k; `v_scale` alike. None means 1.
        v_scale: see `k_scale`.
        out: [T, Hq, D], receives the result.

    Raises:
        ValueError: a sequence has more query tokens than tokens.
    """
    op = _PagedAttention(k_cache, v_cache, scale, window, softcap, sinks, k_scale, v_scale)
    out = torch.zeros_like(q) if out is None else out.zero_()
    begins, lens = cu_seqlens_q.tolist(), seq_lens.tolist()
    decode: list[int] = []
    for s, length in enumerate(lens):
        begin, end = begins[s], begins[s + 1]
        if end - begin > length > 0:
            raise ValueError(f"seq_lens[{s}] is {length}, less than its {end - begin} query tokens")
        if end - begin == 1 and length > 0:
            decode.append(s)
        elif end > begin and length > 0:
            out[begin:end] = op.prefill(q[begin:end], block_table[s], length)
    if decode:
        rows = torch.tensor([begins[s] for s in decode], device=q.device)
        op.decode(q, rows, block_table[decode], [lens[s] for s in decode], out)
    return out


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    num_splits: int = 1,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query token per sequence; q and the result are [S, Hq, D], rows of length 0 come out zero.

    As `unified_attention` with one query each. `num_splits` (the most parts that the keys of a row are divided into)
    and `workspace` (scratch for the parts) shape a device kernel's launch; they have no effect here.
    """
    op = _PagedAttention(k_cache, v_cache, scale, window, softcap, None, k_scale, v_scale)
    out = torch.zeros_like(q) if out is None else out.zero_()
    lens = seq_lens.tolist()
    live = [s for s, length in enumerate(lens) if length > 0]
    if live:
        rows = torch.tensor(live, device=q.device)
        op.decode(q, rows, block_table.index_select(0, rows), [lens[s] for s in live], out)
    return out


@dataclass(frozen=True, slots=True)
class _PagedAttention:
    """One call's cache and constants."""

    k_cache: Tensor
    v_cache: Tensor
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    k_scale: float | Tensor | None
    v_scale: float | Tensor | None

    def prefill(self, q: Tensor, blocks: Tensor, length: int) -> Tensor:
        """Attend q [N, Hq, D], the last N tokens of a sequence of `length` tokens."""
        page = self.k_cache.shape[1]
        n = q.shape[0]
        first = max(0, length - n + 1 - self.window) if self.window else 0  # the first key any query sees
        start = first // page * page
        live = slice(first - start, length - start)
        ids = blocks[start // page : -(-length // page)]
        k = _gather_blocks(self.k_cache, ids, self.k_scale)[live].transpose(0, 1)
        v = _gather_blocks(self.v_cache, ids, self.v_scale)[live].transpose(0, 1)

        causal = n == length and not self.window
        mask = None
        if not causal:
            keys = torch.arange(first, length, device=q.device)
            queries = torch.arange(length - n, length, device=q.device).unsqueeze(1)
            mask = keys <= queries
            if self.window:
                mask &= keys > queries - self.window
        heads = q.float().transpose(0, 1).unsqueeze(0)
        sinks = None if self.sinks is None else self.sinks.view(-1, 1, 1)
        result = self._attend(heads, k.unsqueeze(0), v.unsqueeze(0), mask, causal=causal, sinks=sinks)
        return result[0].transpose(0, 1)

    def decode(self, q: Tensor, rows: Tensor, block_table: Tensor, lens: Sequence[int], out: Tensor) -> None:
        """Attend rows `rows` of q, row i being the last token of a sequence of `lens[i]` > 0 tokens, into `out`."""
        page, kv_heads, head_dim = *self.k_cache.shape[1:3], head_dim_of(self.k_cache)
        sinks = None if self.sinks is None else self.sinks.view(kv_heads, -1, 1)
        widths = [min(n, self.window) if self.window else n for n in lens]
        # Neighbours in this order are about equally long, so little of a group is padding.
        order = sorted(range(len(lens)), key=lambda i: -widths[i])
        at = 0
        while at < len(order):
            width = widths[order[at]]
            group = order[at : at + max(1, _GROUP_ELEMENTS // (width * kv_heads * head_dim))]
            at += len(group)
            end = torch.tensor([lens[i] for i in group], device=q.device).unsqueeze(1)
            begin = end - torch.tensor([widths[i] for i in group], device=q.device).unsqueeze(1)
            positions = begin + torch.arange(width, device=q.device)
            mask = None
            if widths[group[-1]] < width:
                # A weight of zero does not silence a NaN, so what is masked is read from a live slot of the row, too.
                mask = (positions < end).view(len(group), 1, 1, width)
                positions = torch.minimum(positions, end - 1)
            slots = block_table[group].gather(1, positions // page) * page + positions % page
            k = _gather_slots(self.k_cache, slots, self.k_scale)
            v = _gather_slots(self.v_cache, slots, self.v_scale)
            chosen = rows[group]
            grouped = q.index_select(0, chosen).float().view(len(group), kv_heads, -1, head_dim)
            result = self._attend(grouped, k.transpose(1, 2), v.transpose(1, 2), mask, causal=False, sinks=sinks)
            out.index_copy_(0, chosen, result.reshape(len(group), -1, head_dim).to(out.dtype))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, sinks: Tensor | None
    ) -> Tensor:
        """Attend q [B, H, N, D] over k and v [B, Hkv, L, D]; `sinks` broadcasts to [B, H, N, 1]."""
        if sinks is None and not self.softcap:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * self.scale
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        return weights @ v.repeat_interleave(group, 1)


def _gather_blocks(cache: Tensor, ids: Tensor, scale: float | Tensor | None) -> Tensor:
    """Return the tokens of blocks `ids` [N], [N * page_size, Hkv, D] in float32."""
    return _dequantise(_readable(cache).index_select(0, ids), cache.dtype, scale).flatten(0, 1)


def _gather_slots(cache: Tensor, slots: Tensor, scale: float | Tensor | None) -> Tensor:
    """Return the tokens in `slots` [R, L], [R, L, Hkv, D] in float32."""
    page = cache.shape[1]
    if bool((slots < 0).any()):
        raise IndexError("block_table names a block that the cache does not have")
    return _dequantise(_readable(cache)[slots // page, slots % page].contiguous(), cache.dtype, scale)


def _readable(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8) if cache.dtype == E4M3 else cache  # index_select does not know the type


def _dequantise(gathered: Tensor, dtype: torch.dtype, scale: float | Tensor | None) -> Tensor:
    values = from_int8_rows(gathered) if dtype == torch.int8 else gathered.view(dtype).float()
    return values if scale is None else values * scale
