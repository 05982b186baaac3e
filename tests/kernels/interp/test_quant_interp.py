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
