"""Paged caches with poison around the live slots, and the float64 oracle of attention over them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from scalellm.kernels import Capability, Ops, select_ops
from scalellm.kernels.cpu.cache import can_have_layout, keys_by_token


@dataclass(frozen=True)
class PagedCase:
    """A cache in which exactly the live slots are finite, and the dense K and V of each sequence."""

    q: Tensor  # [T, Hq, D]
    k_cache: Tensor  # [num_blocks, page, Hkv, D]; NaN outside the live slots
    v_cache: Tensor
    block_table: Tensor  # [S, max_blocks] i32; spare entries point at a page of NaN
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    k: list[Tensor]  # per sequence [len, Hkv, D] float64
    v: list[Tensor]

    @property
    def max_seqlen_q(self) -> int:
        return int(self.cu_seqlens_q.diff().max())


def make_paged_case(
    lens: list[int],
    q_lens: list[int],
    *,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    seed: int = 0,
) -> PagedCase:
    """Build random sequences; with a window, keys that no query sees are poisoned too."""
    g = torch.Generator().manual_seed(seed)
    needed = [-(-n // page) for n in lens]
    num_blocks = sum(needed) + 2
    ids = torch.randperm(num_blocks - 1, generator=g) + 1  # page 0 stays poison
    shape = (num_blocks, page, kv_heads, head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    block_table = torch.zeros(len(lens), max([*needed, 1]) + 2, dtype=torch.int32)
    ks, vs, taken = [], [], 0
    for s, (length, count) in enumerate(zip(lens, needed, strict=True)):
        blocks = ids[taken : taken + count]
        taken += count
        block_table[s, :count] = blocks
        k = torch.randn(length, kv_heads, head_dim, generator=g).to(dtype)
        v = torch.randn(length, kv_heads, head_dim, generator=g).to(dtype)
        first = max(0, length - q_lens[s] + 1 - window) if window else 0
        for at in range(first, length):
            k_cache[blocks[at // page], at % page] = k[at]
            v_cache[blocks[at // page], at % page] = v[at]
        ks.append(k.double())
        vs.append(v.double())
    cu = torch.tensor([0, *q_lens]).cumsum(0).int()
    q = torch.randn(sum(q_lens), q_heads, head_dim, generator=g).to(dtype)
    return PagedCase(q, k_cache, v_cache, block_table, cu, torch.tensor(lens, dtype=torch.int32), ks, vs)


def naive_attention(
    case: PagedCase, *, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Attend one query and one head at a time in float64, as the definition reads."""
    q = case.q.double()
    out = torch.zeros_like(q)
    group = q.shape[1] // case.k_cache.shape[2]
    for s, length in enumerate(case.seq_lens.tolist()):
        begin, end = case.cu_seqlens_q[s : s + 2].tolist()
        for row in range(begin, end if length else begin):
            position = length - (end - row)
            first = max(0, position - window + 1) if window else 0
            for h in range(q.shape[1]):
                scores = case.k[s][first : position + 1, h // group] @ q[row, h] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                logits = scores if sinks is None else torch.cat((scores, sinks[h : h + 1].double()))
                weights = torch.softmax(logits, 0)[: len(scores)]
                out[row, h] = weights @ case.v[s][first : position + 1, h // group]
    return out


@pytest.fixture
def paged_case() -> Callable[..., PagedCase]:
    return make_paged_case


@pytest.fixture
def as_the_cache_lies() -> Callable[[Ops, Tensor], Tensor]:
    """Return keys `[num_blocks, page, Hkv, D]` as they lie in the cache of a form of the ops."""

    def lay(ops: Ops, keys: Tensor) -> Tensor:
        if ops.library is None or not can_have_layout(keys.shape[1], keys.shape[3]):
            return keys
        return keys_by_token(keys.permute(0, 2, 3, 1).contiguous())

    return lay


@pytest.fixture
def attention_oracle() -> Callable[..., Tensor]:
    return naive_attention


@pytest.fixture(scope="session", params=["torch", "cpp"])
def ops(request) -> Ops:
    """All ops in one form that runs on the CPU. C++ is compiled when it is first asked for, once per machine."""
    cpu = Capability.of(torch.device("cpu"))
    chosen = select_ops(cpu, dtype=torch.float32, overrides={"all": request.param})
    if request.param not in chosen.backends.values():
        pytest.skip("the C++ forms could not be compiled here")
    return chosen
