import pytest
import torch

TOKEN_LORA = torch.tensor([1, -1, 0, 1, 2], dtype=torch.int32)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_what_no_token_needs_is_not_read(ops):
    x = torch.full((5, 100), torch.nan)[:, 30:70].copy_(randn(5, 40))
    a, b = torch.full((4, 8, 40), torch.nan), torch.full((4, 24, 8), torch.nan)
    a[:3], b[:3] = randn(3, 8, 40, seed=1), randn(3, 24, 8, seed=2)
    y = ops.lora_shrink(x, a, TOKEN_LORA)
    assert torch.equal(y, ops.lora_shrink(x.contiguous(), a[:3], TOKEN_LORA))
    wide = torch.full((5, 60), torch.nan)
    out = wide[:, 10:34].zero_()
    ops.lora_expand(y, b, TOKEN_LORA, out=out)
    assert torch.equal(out, ops.lora_expand(y, b[:3], TOKEN_LORA, out=torch.zeros(5, 24)))
    assert wide[:, :10].isnan().all()
    assert wide[:, 34:].isnan().all()


def test_columns_that_do_not_fit_are_refused(ops):
    with pytest.raises(ValueError, match="offset: columns 5 to 29 do not fit in the 28 of out"):
        ops.lora_expand(randn(5, 4), randn(3, 24, 4), TOKEN_LORA, out=torch.zeros(5, 28), offset=5)


def test_an_empty_batch(ops):
    none = torch.zeros(0, dtype=torch.int32)
    y = ops.lora_shrink(torch.zeros(0, 8), randn(2, 4, 8), none)
    assert y.shape == (0, 4)
    assert ops.lora_expand(y, randn(2, 6, 4), none, out=torch.zeros(0, 6)).shape == (0, 6)
