import pytest
import torch

from scalellm.kernels import gemm_wna16_workspace_size
from scalellm.kernels.spec.gemm_wna16 import pack, unpacked

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def packed_case(bits, rows, inner, columns, group_size, dtype, with_zeros):
    """Return the operands and the product in float64."""
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 1 << bits, (inner, columns), generator=g)
    words = pack(q, bits)
    groups = inner // group_size
    scales = ((torch.rand(groups, columns, generator=g) + 0.5) / (1 << bits)).to(dtype)
    zeros = (torch.rand(groups, columns, generator=g) * (1 << bits)).to(dtype) if with_zeros else None
    x = torch.randn(rows, inner, generator=g).to(dtype)
    return x, words, scales, zeros, x.double() @ unpacked(q, scales, zeros, bits)


def assert_close(got, exact):
    error = (got.double() - exact).norm() / exact.norm()
    assert error < TOLERANCE[got.dtype], float(error)


def test_a_row_does_not_depend_on_the_others_nor_on_the_scratch(ops, launch):
    x, *weight, exact = packed_case(4, 5, 1024, 64, 128, torch.bfloat16, False)
    size = gemm_wna16_workspace_size(launch.capability, 4, 5, 1024, 64, 128)
    assert size > 5 * 64
    together = ops.w4a16_gemm(x, *weight, group_size=128)
    scratch = torch.full((size,), torch.nan)
    assert torch.equal(ops.w4a16_gemm(x, *weight, group_size=128, workspace=scratch), together)
    assert torch.equal(ops.w4a16_gemm(x[3:4], *weight, group_size=128), together[3:4])
    assert_close(together, exact)


def test_x_and_out_may_be_strided(ops):
    x, *weight, exact = packed_case(4, 2, 128, 64, 128, torch.bfloat16, False)
    wide_x = torch.full((2, 300), torch.nan, dtype=torch.bfloat16)
    wide_x[:, 100:228] = x
    wide = torch.full((2, 100), torch.nan, dtype=torch.bfloat16)
    ops.w4a16_gemm(wide_x[:, 100:228], *weight, group_size=128, out=wide[:, :64])
    assert_close(wide[:, :64], exact)
    assert wide[:, 64:].isnan().all()


def test_shapes_that_do_not_belong_together_are_refused(ops):
    x, words, scales, zeros, _ = packed_case(4, 2, 64, 16, 32, torch.bfloat16, True)
    with pytest.raises(ValueError, match="scales: shape"):
        ops.w4a16_gemm(x, words, scales[:, :5], zeros, group_size=32)
    with pytest.raises(ValueError, match="interleave: 3 does not divide the 8 words of a column"):
        ops.w4a16_gemm(x, words, scales, zeros, group_size=32, interleave=3)
    with pytest.raises(ValueError, match="zeros: shape"):
        ops.w8a16_gemm(x, words, torch.ones(1, 16), zeros[:, :3], group_size=32)


def test_an_empty_batch(ops):
    _, *weight, _ = packed_case(4, 1, 64, 16, 32, torch.bfloat16, False)
    assert ops.w4a16_gemm(torch.zeros(0, 64).bfloat16(), *weight, group_size=32).shape == (0, 16)
