import pytest
import torch

from virtual_memory import virtual_tensor

E4M3 = torch.float8_e4m3fn


def caches(blocks, dtype, shape=(16, 2, 8)):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(blocks, *shape, generator=g).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, E4M3])
def test_sources_are_read_before_anything_is_written(ops, dtype):
    k, v = caches(6, dtype)
    before_k, before_v = k.float().clone(), v.float().clone()
    ops.copy_blocks_(k, v, torch.tensor([[0, 1], [1, 2], [2, 0], [3, 5]]))
    order = [2, 0, 1, 3, 4, 3]
    assert torch.equal(k.float(), before_k[order])
    assert torch.equal(v.float(), before_v[order])


@pytest.mark.parametrize("count", [0, 1, 16, 17, 256, 257])
def test_any_number_of_pairs(ops, count):
    k, v = caches(2 * max(count, 1), torch.float32, (16, 1, 2))
    before = k.clone()
    sources = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    ops.copy_blocks_(k, v, torch.stack((sources, torch.arange(count) + count), dim=1))
    assert torch.equal(k[count:], before[sources] if count else before[count:])
    assert torch.equal(k[:count], before[:count])


def test_blocks_past_two_to_the_31_elements(ops):
    blocks = 8_400_000
    cache = virtual_tensor(blocks, 16, 1, 64, dtype=torch.float16)
    assert cache.view(torch.int64).numel() > 2**31  # the kernel counts in words of 8 bytes
    cache[-1] = torch.arange(64)
    values = virtual_tensor(blocks, 16, 1, 64, dtype=torch.float16)
    ops.copy_blocks_(cache, values, torch.tensor([[blocks - 1, blocks - 3]]))
    assert torch.equal(cache[-3], cache[-1])
    assert (cache[-3] == torch.arange(64)).all()
