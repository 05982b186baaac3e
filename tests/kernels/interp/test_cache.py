import torch

from virtual_memory import virtual_tensor


def test_blocks_past_two_to_the_31_elements(ops):
    blocks = 8_400_000
    cache = virtual_tensor(blocks, 16, 1, 64, dtype=torch.float16)
    assert cache.view(torch.int64).numel() > 2**31  # the kernel counts in words of 8 bytes
    cache[-1] = torch.arange(64)
    values = virtual_tensor(blocks, 16, 1, 64, dtype=torch.float16)
    ops.copy_blocks_(cache, values, torch.tensor([[blocks - 1, blocks - 3]]))
    assert torch.equal(cache[-3], cache[-1])
    assert (cache[-3] == torch.arange(64)).all()
