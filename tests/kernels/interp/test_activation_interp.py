import pytest
import torch
import torch.nn.functional as F

from scalellm.kernels import gelu_tanh_and_mul, silu_and_mul

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the sigmoid of a gate far below 0

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def packed(rows, width, dtype, spread=4.0):
    return (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)) * spread).to(dtype)


def exact(name, x):
    gate, up = x.double().chunk(2, dim=-1)
    return (F.silu(gate) if name == "silu_and_mul" else F.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize(
    ("name", "reference"), [("silu_and_mul", silu_and_mul), ("gelu_tanh_and_mul", gelu_tanh_and_mul)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 1500])
def test_computed_scales_are_those_of_the_two_ops_one_after_the_other(ops, name, reference, dtype, width):
    x = packed(4, width, dtype, spread=6.0)
    x[2] = 0
    scales, out = torch.full((4, 1), torch.nan), torch.full((4, width), torch.nan).to(torch.float8_e4m3fn)
    assert getattr(ops, name)(x, token_scale=scales, out=out) is out
    codes, expected = ops.scaled_fp8_quant(getattr(ops, name)(x))
    assert torch.equal(out.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scales, expected)
    reference_scale = torch.empty(4, 1)
    reference(x, token_scale=reference_scale)
    torch.testing.assert_close(scales, reference_scale, rtol=TOLERANCE[dtype], atol=1e-9)


def test_two_scales_are_refused(ops):
    with pytest.raises(ValueError, match="token_scale: not possible together with the static quant_scale"):
        ops.silu_and_mul(torch.zeros(2, 8), quant_scale=1.0, token_scale=torch.ones(2, 1))


def test_rows_may_be_strided(ops):
    whole, wide = torch.full((3, 120), torch.nan), torch.full((3, 50), torch.nan)
    x = whole[:, 40:80].copy_(packed(3, 20, torch.float32))
    out, expected = wide[:, :20], exact("silu_and_mul", x)
    ops.silu_and_mul(x, out=out)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    assert wide[:, 20:].isnan().all()
    scales, codes = torch.empty(3, 1), torch.zeros(3, 50).to(torch.float8_e4m3fn)
    ops.silu_and_mul(x, token_scale=scales, out=codes[:, :20])
    torch.testing.assert_close((codes[:, :20].float() * scales).double(), expected, atol=0, rtol=2**-4)
    assert (codes[:, 20:].float() == 0).all()


def test_an_empty_batch(ops):
    assert ops.silu_and_mul(torch.zeros(0, 8)).shape == (0, 4)
