"""Paged caches with poison around the live slots, and the forms of the ops that run on the CPU."""

from collections.abc import Callable

import pytest
import torch

from scalellm.kernels import Capability, Ops, select_ops
from scalellm.kernels.spec.case import Maker
from scalellm.kernels.spec.paged import Heads, Options, Paged, paged

CPU = torch.device("cpu")


@pytest.fixture
def paged_case() -> Callable[..., Paged]:
    def make(
        lens: list[int],
        q_lens: list[int],
        *,
        q_heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        page: int = 16,
        dtype: torch.dtype = torch.float32,
        window: int = 0,
    ) -> Paged:
        heads = Heads(q_heads, kv_heads, head_dim, page)
        return paged(Maker.on(CPU), heads, lens, q_lens, Options(dtype, window=window))

    return make


@pytest.fixture(scope="session", params=["torch", "cpp"])
def ops(request) -> Ops:
    """All ops in one form that runs on the CPU. C++ is compiled when it is first asked for, once per machine."""
    chosen = select_ops(Capability.of(CPU), dtype=torch.float32, overrides={"all": request.param})
    if request.param not in chosen.backends.values():
        pytest.skip("the C++ forms could not be compiled here")
    return chosen
