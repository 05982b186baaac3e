"""Blocks come back from host memory bit by bit, wherever they go."""

import random

import pytest
import torch

from scalellm.services.executor.models import KVCache
from scalellm.services.executor.runner import FakeCudaDevice, host_cache
from scalellm.services.executor.runner.host_cache import HostCache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_blocks_come_back_bit_by_bit(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cache, "_CHUNK", 50_000)  # from 4 to 16 blocks
    rng = random.Random(count)
    caches = [KVCache(*(torch.randn(64, 16, 2, 8).to(dtype) for _ in range(2))) for _ in range(3)]
    original = [(cache.k.clone(), cache.v.clone()) for cache in caches]
    host = HostCache(caches, 50, FakeCudaDevice())
    assert host.bytes_per_block == 3 * 2 * 16 * 2 * 8 * dtype.itemsize

    sources, places = rng.sample(range(64), count), rng.sample(range(50), count)
    host.store(list(zip(sources, places, strict=True)))
    for cache in caches:
        cache.k.view(torch.uint8).fill_(255)
        cache.v.view(torch.uint8).fill_(255)
    targets = rng.sample(range(64), count)
    host.load(list(zip(targets, places, strict=True)))
    for cache, (k, v) in zip(caches, original, strict=True):
        for target, source in zip(targets, sources, strict=True):
            assert torch.equal(cache.k[target].view(torch.uint8), k[source].view(torch.uint8))
            assert torch.equal(cache.v[target].view(torch.uint8), v[source].view(torch.uint8))
        untouched = [block for block in range(64) if block not in targets]
        assert bool((cache.k.view(torch.uint8)[untouched] == 255).all())


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_measuring_keeps_what_is_there(num_blocks: int) -> None:
    cache = KVCache(torch.randn(8, 16, 2, 8), torch.randn(8, 16, 2, 8))
    original = cache.k.clone()
    cost = HostCache([cache], num_blocks, FakeCudaDevice()).measure()
    assert cost.bytes_per_block == 2 * 16 * 2 * 8 * 4
    assert cost.bytes_per_second > 0
    assert cost.seconds_per_transfer >= 0
    assert torch.equal(cache.k, original)
