import pytest
import torch

from scalellm.kernels import lora_expand, lora_shrink


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shrink_and_expand_apply_each_tokens_adapter(dtype):
    x, a, b = randn(7, 16).to(dtype), randn(3, 4, 16, seed=1).to(dtype), randn(3, 10, 4, seed=2).to(dtype)
    token_lora = torch.tensor([2, -1, 0, 0, 2, -1, 1], dtype=torch.int32)
    scaling = torch.tensor([0.5, 2.0, 1.0])
    y = torch.full((7, 4), torch.nan)
    assert lora_shrink(x, a, token_lora, scaling=scaling, out=y) is y
    base = randn(7, 15, seed=3).to(dtype)
    out = base.clone()
    assert lora_expand(y, b, token_lora, out=out, offset=5) is out

    expected = base.double()
    for t, adapter in enumerate(token_lora.tolist()):
        if adapter >= 0:
            low = x[t].double() @ a[adapter].double().T * scaling[adapter].double()
            expected[t, 5:] += low @ b[adapter].double().T
        else:
            assert (y[t] == 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(out[:, :5], base[:, :5])
    assert torch.equal(out[token_lora < 0], base[token_lora < 0])


def test_columns_outside_the_result_are_refused():
    with pytest.raises(ValueError, match="offset: columns 6 to 16 do not fit in the 15 of out"):
        lora_expand(randn(1, 4), randn(1, 10, 4), torch.zeros(1).int(), out=randn(1, 15), offset=6)
