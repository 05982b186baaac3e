import pytest
import torch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
TOKEN_LORA = torch.tensor([1, -1, 0, 1, 2], dtype=torch.int32)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("hidden", "rank", "dtype", "scaled"), [(40, 4, torch.float32, False), (600, 9, torch.bfloat16, True)]
)
def test_shrink(ops, hidden, rank, dtype, scaled):
    x, a = randn(5, hidden, dtype=dtype), randn(3, rank, hidden, seed=1, dtype=dtype)
    scaling = torch.tensor([0.5, 2.0, 3.0]) if scaled else None
    out = torch.full((5, rank), torch.nan)
    assert ops.lora_shrink(x, a, TOKEN_LORA, scaling=scaling, out=out) is out
    for t, adapter in enumerate(TOKEN_LORA.tolist()):
        expected = torch.zeros(rank, dtype=torch.float64)
        if adapter >= 0:
            expected = a[adapter].double() @ x[t].double() * (scaling[adapter] if scaled else 1.0)
        torch.testing.assert_close(out[t].double(), expected, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize(("columns", "rank", "dtype"), [(24, 4, torch.float32), (130, 9, torch.bfloat16)])
def test_expand_adds_to_its_columns_only(ops, columns, rank, dtype):
    y, b = randn(5, rank), randn(3, columns, rank, seed=1, dtype=dtype)
    out = randn(5, columns + 20, seed=2, dtype=dtype)
    expected = out.double()
    for t, adapter in enumerate(TOKEN_LORA.tolist()):
        if adapter >= 0:
            expected[t, 7 : 7 + columns] += b[adapter].double() @ y[t].double()
    before = out.clone()
    assert ops.lora_expand(y, b, TOKEN_LORA, out=out, offset=7) is out
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])
    assert torch.equal(out[:, :7], before[:, :7])
    assert torch.equal(out[:, 7 + columns :], before[:, 7 + columns :])
    assert torch.equal(out[1], before[1])


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
