import pytest
import torch

from scalellm.kernels import fp8_gemm

E4M3 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(scale, shape):
    """Return a scale in float64 for each element of a matrix."""
    scale = scale.double().reshape(1, 1) if scale.numel() == 1 else scale.double()
    return torch.kron(scale, torch.ones(shape[0] // scale.shape[0], shape[1] // scale.shape[1], dtype=torch.float64))


def exact(a, b, a_scale, b_scale):
    return (a.double() * spread(a_scale, a.shape)) @ (b.double() * spread(b_scale, b.shape)).T


def assert_close(got, expected):
    error = (got.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[got.dtype], float(error)


# Scales of tensors, of rows, and of groups of 32 or 64 columns for either; dimensions that tiles do not divide.
@pytest.mark.parametrize(
    ("a_scale", "b_scale"), [((1,), (1,)), ((0, 1), (70, 1)), ((0, 3), (35, 6)), ((0, 6), (1,)), ((1,), (7, 3))]
)
@pytest.mark.parametrize("rows", [1, 17, 65])
def test_product(ops, rows, a_scale, b_scale):
    a, b = randn(rows, 192).to(E4M3), randn(70, 192, seed=1).to(E4M3)
    a_scale = randn(*(n or rows for n in a_scale), seed=2).abs()
    b_scale = randn(*b_scale, seed=3).abs()
    dtype = {1: torch.bfloat16, 17: torch.float16, 65: torch.float32}[rows]
    wide = torch.full((rows, 80), torch.nan, dtype=dtype)
    out = wide[:, :70]
    assert ops.fp8_gemm(a, b, a_scale, b_scale, out=out) is out
    assert_close(out, exact(a, b, a_scale, b_scale))
    assert wide[:, 70:].isnan().all()
    assert_close(fp8_gemm(a, b, a_scale, b_scale, out_dtype=dtype), exact(a, b, a_scale, b_scale))


def test_bias_and_an_inner_dimension_of_less_than_a_tile(ops):
    a, b, one = randn(3, 24).to(E4M3), randn(20, 24, seed=1).to(E4M3), torch.tensor(0.5)
    bias = randn(20, seed=2).bfloat16()
    got = ops.fp8_gemm(a, b, one, one, bias=bias, out_dtype=torch.float32)
    assert_close(got, exact(a, b, one, one) + bias.double())


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


def test_an_empty_batch(ops):
    empty = torch.zeros(0, 64).to(E4M3)
    assert ops.fp8_gemm(empty, randn(8, 64).to(E4M3), torch.zeros(0, 2), torch.ones(1, 2)).shape == (0, 8)
