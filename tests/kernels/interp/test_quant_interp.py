import pytest
import torch

from scalellm.kernels import scaled_fp8_quant

E4M3 = torch.float8_e4m3fn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_codes(q, expected):
    """Hold that codes are equal, but for a few at the midpoint between two, where either is as good."""
    apart = (q.float() - expected.float()).abs()
    assert (apart > 0).float().mean() < 0.01
    assert (apart <= 0.13 * expected.float().abs()).all()


@pytest.mark.parametrize("group_size", [None, 16, 64, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [192, 1152])
def test_computed_scales(ops, dtype, group_size, columns):
    x = (randn(4, columns) * 30).to(dtype)
    x[2] = 0
    q, s = ops.scaled_fp8_quant(x, group_size=group_size)
    expected_q, expected_s = scaled_fp8_quant(x, group_size=group_size)
    assert torch.equal(s, expected_s)
    assert_codes(q, expected_q)


@pytest.mark.parametrize("columns", [8, 1500])
def test_static_scale(ops, columns):
    x = randn(3, columns) * 1000
    scale = torch.tensor([0.37])
    q, s = ops.scaled_fp8_quant(x, scale)
    assert s is scale
    assert_codes(q, scaled_fp8_quant(x, scale)[0])
    assert q.float().abs().max() == 448


def test_results_go_into_out(ops):
    x = torch.full((3, 300), torch.nan)[:, 64:192].copy_(randn(3, 128))
    q, s = torch.empty(3, 256).to(E4M3), torch.full((3, 4), torch.nan)
    target = q[:, 128:]
    got = ops.scaled_fp8_quant(x, group_size=64, out=(target, s[:, 1:3]))
    expected_q, expected_s = scaled_fp8_quant(x, group_size=64)
    assert_codes(got[0], expected_q)
    assert torch.equal(s[:, 1:3], expected_s)
    assert s[:, [0, 3]].isnan().all()


def test_impossible_groups_are_refused(ops):
    with pytest.raises(ValueError, match="group_size: 24 does not divide the 64 columns"):
        ops.scaled_fp8_quant(randn(2, 64), group_size=24)
    with pytest.raises(ValueError, match="group_size"):
        ops.scaled_fp8_quant(randn(2, 64), torch.tensor(1.0), group_size=64)


def test_an_empty_batch(ops):
    assert ops.scaled_fp8_quant(torch.zeros(0, 8))[0].shape == (0, 8)
