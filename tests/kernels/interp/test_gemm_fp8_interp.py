import pytest
import torch

from scalellm.kernels.triton import gemm_fp8
from scalellm.kernels.triton.overlap import bytes_for_next

E4M3 = torch.float8_e4m3fn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_columns_behind_the_result_are_not_written(ops):
    a, b, one = randn(17, 192).to(E4M3), randn(70, 192, seed=1).to(E4M3), torch.ones(1)
    wide = torch.full((17, 80), torch.nan)
    ops.fp8_gemm(a, b, one, one, out=wide[:, :70])
    torch.testing.assert_close(wide[:, :70].double(), a.double() @ b.double().T, atol=1e-3, rtol=1e-5)
    assert wide[:, 70:].isnan().all()


def test_a_row_does_not_depend_on_the_others(ops):
    a, b = randn(5, 128).to(E4M3), randn(32, 128, seed=1).to(E4M3)
    a_scale, b_scale = randn(5, 2, seed=2).abs(), randn(1, 2, seed=3).abs()
    together = ops.fp8_gemm(a, b, a_scale, b_scale)
    assert torch.equal(ops.fp8_gemm(a[3:4], b, a_scale[3:4], b_scale), together[3:4])


def test_scales_that_do_not_fit_are_refused(ops):
    a, b, one = randn(4, 96).to(E4M3), randn(20, 96).to(E4M3), torch.ones(1)
    with pytest.raises(ValueError, match=r"b_scale: shape \(3, 1\) does not divide \(20, 96\)"):
        ops.fp8_gemm(a, b, one, torch.ones(3, 1))
    with pytest.raises(ValueError, match="a_scale: 2 rows for 4 of a"):
        ops.fp8_gemm(a, b, torch.ones(2, 1), one)
    with pytest.raises(ValueError, match="a_scale: stretches of 16 columns; the width must be a multiple of 32"):
        ops.fp8_gemm(a, b, torch.ones(4, 6), one)


def test_few_rows_are_multiplied_here_and_many_by_torch(ops, monkeypatch):
    many = []
    monkeypatch.setattr(gemm_fp8, "has_e4m3_units", lambda device: True)
    monkeypatch.setattr(gemm_fp8, "scaled_mm", lambda a, *rest, **options: many.append(a.shape[0]))
    b, b_scale = randn(32, 64).to(E4M3), torch.ones(32, 1)
    for rows in (1, 16, 17):
        a = randn(rows, 64, seed=rows).to(E4M3)
        y = ops.fp8_gemm(a, b, torch.ones(rows, 1), b_scale)
        if rows <= 16:
            torch.testing.assert_close(y.double(), a.double() @ b.double().T, rtol=1e-2, atol=1e-2)
    assert many == [17]


def test_of_a_weight_of_many_rows_more_rows_are_few(ops, monkeypatch):
    many = []
    monkeypatch.setattr(gemm_fp8, "has_e4m3_units", lambda device: True)
    monkeypatch.setattr(gemm_fp8, "scaled_mm", lambda a, *rest, **options: many.append(a.shape[0]))
    a, b, b_scale = randn(65, 64).to(E4M3), randn(16400, 64, seed=1).to(E4M3), torch.ones(16400, 1)
    a_scale = torch.rand(65, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    together, few = (ops.fp8_gemm(a[:rows], b, a_scale[:rows], b_scale) for rows in (64, 17))
    assert torch.equal(together[:17], few)  # whatever is beside a row
    ops.fp8_gemm(a, b, a_scale, b_scale)
    ops.fp8_gemm(a[:17], b[:16384], a_scale[:17], b_scale[:16384])
    assert many == [65, 17]


@pytest.mark.parametrize(("rows", "columns"), [(16, 16400), (17, 16400), (64, 16400), (65, 16400), (17, 64)])
def test_a_weight_is_fetched_ahead_by_its_product_or_by_the_kernel_before(launch, rows, columns):
    weight = torch.empty(columns, 64, dtype=E4M3, device="meta")
    by_product = launch.tile("fp8_gemm", rows=rows, columns=columns)["own"]
    assert (bytes_for_next(launch, weight, rows, programs=8) == 0) == by_product
    as_bf16 = weight.to(torch.bfloat16)  # of which few rows are up to 16, whatever the weight
    assert (bytes_for_next(launch, as_bf16, rows, programs=8) == 0) == (rows <= 16)


def test_an_empty_batch(ops):
    empty = torch.zeros(0, 64).to(E4M3)
    assert ops.fp8_gemm(empty, randn(8, 64).to(E4M3), torch.zeros(0, 2), torch.ones(1, 2)).shape == (0, 8)
