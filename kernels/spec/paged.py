"""Paged caches in which every slot that must not be read holds NaN, and attention over them in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import BF16, E4M3, FP16, FP32, META, Bound, Case, Maker, as_integers, name_of

# Weights are rounded to the dtype before they are multiplied, and the result is.
_TOLERANCE = {FP32: 2e-6, BF16: 1e-2, FP16: 1.5e-3}


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of the heads and pages of a cache."""

    q: int
    kv: int
    dim: int
    page: int = 64

    def __str__(self) -> str:
        return f"{self.q}/{self.kv}x{self.dim} page {self.page}"


@dataclass(frozen=True, slots=True)
class Options:
    """Options of attention, and the dtypes of its inputs."""

    dtype: torch.dtype = BF16
    cache_dtype: torch.dtype | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @property
    def scales(self) -> tuple[float, float]:
        """Factors of a key and of a value in the cache; 1 where it is not e4m3."""
        return (0.5, 0.25) if self.cache_dtype == E4M3 else (1.0, 1.0)

    @property
    def min_sm(self) -> int:
        """The least compute capability that has the cache's dtype, times 10."""
        return 89 if self.cache_dtype == E4M3 else 80

    def arguments(self, make: Maker) -> dict[str, Any]:
        """Return the keyword arguments of both ops of attention; sinks, which only one of them takes, are left out."""
        found: dict[str, Any] = {"window": self.window, "softcap": self.softcap}
        if self.cache_dtype == E4M3:
            found |= {f"{name}_scale": make.tensor([s], FP32) for name, s in zip("kv", self.scales, strict=True)}
        return found

    def __str__(self) -> str:
        marks = (
            name_of(self.dtype),
            f"{name_of(self.cache_dtype)} cache" if self.cache_dtype else "",
            f"window {self.window}" if self.window else "",
            f"softcap {self.softcap:g}" if self.softcap else "",
            "sinks" if self.sinks else "",
        )
        return " ".join(mark for mark in marks if mark)


PLAIN = Options()

LLAMA = Heads(32, 8, 128)
SHAPES = (  # of cases for a GPU
    LLAMA,
    Heads(8, 8, 128),
    Heads(9, 3, 64, 16),
    Heads(28, 4, 128, 32),
    Heads(8, 1, 128),
    Heads(32, 8, 96),
    Heads(16, 8, 256),
    Heads(4, 1, 256, 16),
)
LENS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 700, 1500, 90, 4000)
SMALL_SHAPES = tuple(  # of cases for the interpreter
    Heads(*heads, 16) for heads in ((9, 3, 64), (16, 2, 96), (7, 1, 128), (4, 1, 256), (10, 2, 64), (8, 1, 96))
)


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

    @property
    def max_seqlen_q(self) -> int:
        """The most queries of a sequence."""
        return max(self.q_lens)

    def attention(self, scale: float, options: Options = PLAIN, sinks: Tensor | None = None) -> Tensor:
        """Attend each sequence over its own keys in float64."""
        out = torch.zeros_like(self.q, dtype=torch.float64)
        begin = 0
        for s, (length, count) in enumerate(zip(self.lens, self.q_lens, strict=True)):
            rows = slice(begin, begin + count)
            begin += count
            if length and count:
                out[rows] = attend(self.q[rows], self.k[s], self.v[s], scale, options, sinks)
        return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, options: Options = PLAIN, sinks: Tensor | None = None
) -> Tensor:
    """Attend the last tokens of a sequence, q [T, Hq, D], over its keys, k and v [len, Hkv, D], in float64."""
    count, length, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (t.double().transpose(0, 1).repeat_interleave(group, 0) for t in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    keys = torch.arange(length, device=q.device)
    queries = torch.arange(length - count, length, device=q.device).unsqueeze(1)
    hidden = keys > queries
    if options.window:
        hidden |= keys <= queries - options.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(-1, count, 1)), dim=-1)
    return (scores.softmax(-1)[..., :length] @ v).transpose(0, 1)


def paged(make: Maker, heads: Heads, lens: Sequence[int], q_lens: Sequence[int], options: Options) -> Paged:
    """Fill a cache, where it has memory; with a window, keys that no query sees are NaN, too."""
    cache_dtype = options.cache_dtype or options.dtype
    needed = [-(-n // heads.page) for n in lens]
    ids = make.permutation(sum(needed) + 1) + 1  # page 0 stays poison
    shape = (sum(needed) + 2, heads.page, heads.kv, heads.dim)
    k_cache, v_cache = make.poison(*shape, dtype=cache_dtype), make.poison(*shape, dtype=cache_dtype)
    table = torch.zeros(len(lens), max([*needed, 1]) + 2, dtype=torch.int32, device=make.device)
    ks: list[Tensor] = []
    vs: list[Tensor] = []
    taken = 0
    for s, (length, count) in enumerate(zip(lens, needed, strict=True) if make.device != META else ()):
        blocks = ids[taken : taken + count]
        taken += count
        table[s, :count] = blocks.int()
        first = max(0, length - q_lens[s] + 1 - options.window) if options.window else 0
        positions = torch.arange(first, length, device=make.device)
        for cache, dense, scale in ((k_cache, ks, options.scales[0]), (v_cache, vs, options.scales[1])):
            values = (make.randn(length, heads.kv, heads.dim) / scale).to(cache_dtype)
            slots = blocks[positions // heads.page] * heads.page + positions % heads.page
            as_integers(cache).flatten(0, 1)[slots] = as_integers(values)[first:]  # indexing does not know e4m3
            dense.append(values.double() * scale)
    cu = make.tensor([sum(q_lens[:i]) for i in range(len(q_lens) + 1)], torch.int32)
    q = make.randn(sum(q_lens), heads.q, heads.dim, dtype=options.dtype)
    return Paged(q, k_cache, v_cache, table, cu, make.tensor(list(lens), torch.int32), q_lens, lens, ks, vs)


def case_of(op: str, what: str, bind: Callable[[Ops, Maker], Bound], options: Options) -> Case:
    """Return a case of one of the ops of attention, held to the tolerance of its dtype."""
    tolerance = _TOLERANCE[options.dtype]
    return Case(op, what, bind, options.dtype, options.cache_dtype, tolerance, min_sm=options.min_sm)


def far_cache(make: Maker, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Return a cache of more than 2^31 elements, of which only the last block is filled, with its table and length."""
    blocks = 16_800_000 // heads.page
    cache = torch.empty(blocks, heads.page, heads.kv, heads.dim, dtype=BF16, device=make.device)
    cache[-1] = make.randn(heads.page, heads.kv, heads.dim, dtype=BF16)
    return cache, make.tensor([[blocks - 1]], torch.int32), make.tensor([heads.page], torch.int32)
