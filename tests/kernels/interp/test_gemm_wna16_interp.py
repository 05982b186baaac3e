import pytest
import torch

from scalellm import kernels
from scalellm.kernels import WNA16_INTERLEAVE, gemm_wna16_workspace_size

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def packed_case(bits, rows, inner, columns, group_size, dtype, with_zeros, *, interleave=1, seed=0):
    """Return the operands and the product in float64."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (inner, columns), generator=g)
    pack = 32 // bits
    shifts = torch.arange(0, 32, bits).view(1, pack, 1, 1)
    words = (q.view(-1, pack, interleave, columns) << shifts).sum(1).view(-1, columns)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    groups = inner // group_size
    scales = ((torch.rand(groups, columns, generator=g) + 0.5) / (1 << bits)).to(dtype)
    zeros = (torch.rand(groups, columns, generator=g) * (1 << bits)).to(dtype) if with_zeros else None
    x = torch.randn(rows, inner, generator=g).to(dtype)
    zero = torch.full((groups, columns), float(1 << (bits - 1))) if zeros is None else zeros
    weight = (q - zero.double().repeat_interleave(group_size, 0)) * scales.double().repeat_interleave(group_size, 0)
    return x, words, scales, zeros, x.double() @ weight


def op(ops, bits):
    return ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm


def assert_close(got, exact):
    error = (got.double() - exact).norm() / exact.norm()
    assert error < TOLERANCE[got.dtype], float(error)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "group_size"),
    [(1, 256, 64, 128), (3, 128, 70, 32), (1, 64, 12, 8), (17, 192, 33, 192), (2, 1024, 130, 1024)],
)
def test_product(ops, bits, with_zeros, rows, inner, columns, group_size):
    dtype = torch.bfloat16 if rows != 3 else torch.float16
    *operands, exact = packed_case(bits, rows, inner, columns, group_size, dtype, with_zeros)
    out = torch.full((rows, columns), torch.nan, dtype=dtype)
    assert op(ops, bits)(*operands, group_size=group_size, out=out) is out
    assert_close(out, exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "group_size"),
    [
        (2, 256, 64, 128),
        (3, 384, 70, 32),
        (1, 128, 12, 8),  # a group is narrower than the interleave
        (100, 128, 33, 64),
        (130, 128, 33, 64),  # unpacked
    ],
)
def test_interleaved_weights(ops, bits, rows, inner, columns, group_size):
    case = {"dtype": torch.bfloat16, "with_zeros": rows != 2, "interleave": WNA16_INTERLEAVE}
    *operands, exact = packed_case(bits, rows, inner, columns, group_size, **case)
    form = {"group_size": group_size, "interleave": WNA16_INTERLEAVE}
    assert_close(op(ops, bits)(*operands, **form), exact)
    assert_close(op(kernels, bits)(*operands, **form), exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [2, 65])
def test_product_in_float32_agrees_with_the_reference(ops, bits, rows):
    *operands, exact = packed_case(bits, rows, 128, 40, 32, torch.float32, True)
    assert_close(op(ops, bits)(*operands, group_size=32), exact)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_are_multiplied_by_the_unpacked_weight(ops, bits):
    *operands, exact = packed_case(bits, 130, 64, 140, 32, torch.bfloat16, True)
    out = torch.full((130, 140), torch.nan, dtype=torch.bfloat16)
    assert op(ops, bits)(*operands, group_size=32, out=out) is out
    assert_close(out, exact)


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
