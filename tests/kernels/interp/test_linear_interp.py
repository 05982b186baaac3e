import pytest
import torch

from scalellm.kernels import Ops, RowNorm, num_squares, select_ops
from scalellm.kernels.spec.linear import squares_of

BF16 = torch.bfloat16


def randn(*shape, seed=0, dtype=BF16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_sums_of_squares_of_one_product_norm_the_next_as_the_separate_ops_would(ops):
    x, residual, weight = randn(5, 48), randn(5, 96, seed=1), randn(96, 48, seed=2)
    norm_weight, following = randn(96, seed=3), randn(128, 96, seed=4)
    apart, added = residual.clone(), residual.clone()
    squares = torch.full((5, num_squares(96)), torch.nan)
    assert ops.fused_linear(x, weight, residual=added, squares=squares) is added

    product = ops.fused_linear(x, weight)
    normed = ops.fused_add_rms_norm(product, apart, norm_weight, 1e-5)
    assert torch.equal(added, apart)
    expected = ops.silu_and_mul(ops.fused_linear(normed, following))
    fused = ops.fused_linear(added, following, norm=RowNorm(squares, norm_weight, 1e-5, False), gate="silu")
    torch.testing.assert_close(fused, expected, rtol=0.02, atol=0.02)  # the mean square's last bit is another
    assert (fused != expected).float().mean() < 0.05


def test_a_row_does_not_depend_on_the_others(ops):
    x, weight, norm_weight = randn(16, 80), randn(128, 80, seed=1), randn(80, seed=2)
    squares = squares_of(x).float()
    for gate in (None, "silu"):
        together = ops.fused_linear(x, weight, norm=RowNorm(squares, norm_weight, 1e-5, False), gate=gate)
        for some in (slice(3, 4), slice(5, 12)):
            norm = RowNorm(squares[some], norm_weight, 1e-5, False)
            assert torch.equal(ops.fused_linear(x[some], weight, norm=norm, gate=gate), together[some])


def test_only_the_result_is_written(ops, last_program_first):
    x, weight = randn(3, 64), randn(40, 64, seed=1)
    wide = torch.full((5, 48), torch.nan, dtype=BF16)
    wide[:3, :40] = 1
    squares = torch.full((5, 2), torch.nan)
    ops.fused_linear(x, weight, residual=wide[:3, :40], squares=squares[:3])
    for untouched in (wide[:3, 40:], wide[3:], squares[3:]):
        assert untouched.isnan().all()
    torch.testing.assert_close(wide[:3, :40].float(), 1 + x.float() @ weight.float().T, rtol=1e-2, atol=5e-2)
    before = wide.clone()
    last_program_first()
    wide[:3, :40] = 1
    ops.fused_linear(x, weight, residual=wide[:3, :40], squares=squares[:3])
    assert torch.equal(wide[:3, :40], before[:3, :40])


def test_a_row_that_is_not_finite_stays_so_and_alone(ops):
    x, weight = randn(3, 64), randn(32, 64, seed=1)
    x[1, 5] = torch.nan
    y = ops.fused_linear(x, weight)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_more_rows_and_options_that_exclude_each_other_are_refused(ops):
    x, weight = randn(17, 32), randn(32, 32)
    with pytest.raises(ValueError, match="x: 17 rows; fused_linear takes 16 at most"):
        ops.fused_linear(x, weight)
    with pytest.raises(ValueError, match="residual: not possible together with gate or out"):
        ops.fused_linear(x[:1], weight, gate="silu", residual=x[:1, :16])
    with pytest.raises(ValueError, match="squares: only of a residual"):
        ops.fused_linear(x[:1], weight, squares=torch.zeros(1, 1))


def test_an_empty_batch(ops):
    assert ops.fused_linear(randn(0, 64), randn(8, 64)).shape == (0, 8)


def test_only_few_rows_of_two_bytes_are_fused(ops):
    wide = select_ops(ops.launch.capability, dtype=torch.float32, launch=ops.launch)
    cases = [(ops, 16, None), (ops, 1, "silu"), (ops, 17, None), (wide, 1, None), (Ops(), 1, None)]
    assert [forms.takes_fused(rows, gate) for forms, rows, gate in cases] == [True, True, False, False, False]
