import pytest
import torch

from scalellm.kernels import fused_add_rms_norm

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_rounds_before_the_weight_in_the_llama_form_and_after_it_in_the_gemma_form(ops):
    x, weight = randn(4, 512, dtype=torch.bfloat16), randn(512, dtype=torch.bfloat16, seed=1)
    for gemma in (False, True):
        expected = fused_add_rms_norm(x, None, weight, 1e-6, gemma=gemma)
        got = ops.fused_add_rms_norm(x, None, weight, 1e-6, gemma=gemma)
        # rsqrt may differ in its last float32 bit, which rarely reaches the eighth.
        assert (got == expected).float().mean() > 0.999


def test_the_output_may_be_the_input_and_rows_may_be_strided(ops):
    wide, residual = torch.full((3, 200), torch.nan), torch.full((3, 300), torch.nan)[:, 100:]
    x = wide[:, :64].copy_(randn(3, 64))
    residual[:, :64] = randn(3, 64, seed=2)
    expected_residual = x + residual[:, :64]
    expected = fused_add_rms_norm(expected_residual, None, torch.ones(64), 1e-6)
    weight, view = torch.ones(64), residual[:, :64]
    ops.fused_add_rms_norm(x, view, weight, 1e-6, out=x)
    torch.testing.assert_close(x, expected)
    assert torch.equal(residual[:, :64], expected_residual)
    assert wide[:, 64:].isnan().all()
    assert residual[:, 64:].isnan().all()


def test_squares_do_not_overflow(ops):
    x = torch.full((1, 700), 300.0, dtype=torch.float16)
    torch.testing.assert_close(ops.fused_add_rms_norm(x, None, torch.ones(700).half(), 1e-6), torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("width", [1, 96, 1000])
def test_computed_scales_are_those_of_the_two_ops_one_after_the_other(ops, dtype, gemma, width):
    x, weight = randn(4, width, dtype=dtype), randn(width, dtype=dtype, seed=1) * 30
    x[2] = 0
    residual = torch.zeros_like(x)
    scales, out = torch.full((4, 3), torch.nan), torch.full((4, width), torch.nan).to(E4M3)
    got = ops.fused_add_rms_norm(x, residual, weight, 1e-6, gemma=gemma, token_scale=scales[:, 1:2], out=out)
    assert got is out
    codes, expected = ops.scaled_fp8_quant(ops.fused_add_rms_norm(x, None, weight, 1e-6, gemma=gemma))
    assert torch.equal(out.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scales[:, 1:2], expected)
    assert scales[:, [0, 2]].isnan().all()
    assert torch.equal(residual, x)
    reference_scale = torch.empty(4, 1)
    fused_add_rms_norm(x, None, weight, 1e-6, gemma=gemma, token_scale=reference_scale)
    torch.testing.assert_close(expected, reference_scale, rtol=TOLERANCE[dtype], atol=1e-9)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("scales", [{"quant_scale": 1.0}, {"token_scale": torch.empty(2, 1)}])
def test_not_a_number_stays_one(ops, scales):
    x = randn(2, 64)
    x[1, 3] = torch.nan
    got = ops.fused_add_rms_norm(x, None, torch.ones(64), 1e-6, **scales)
    assert got[1].float().isnan().any()
    assert got[0].float().isfinite().all()


def test_two_scales_are_refused(ops):
    with pytest.raises(ValueError, match="token_scale: not possible together with the static quant_scale"):
        ops.fused_add_rms_norm(randn(2, 8), None, torch.ones(8), 1e-6, quant_scale=1.0, token_scale=torch.ones(2, 1))


def test_an_empty_batch(ops):
    assert ops.fused_add_rms_norm(torch.zeros(0, 8), torch.zeros(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
