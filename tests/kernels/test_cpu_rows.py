"""Rows of activations and of what they are looked up in, in C++, against torch."""

import pytest
import torch

from scalellm.kernels import Capability, select_ops
from scalellm.kernels.cpu.gemm_wna16 import TiledWeight
from scalellm.kernels.cpu.library import CpuLibrary
from scalellm.kernels.cpu.rows import finite_rows, gather_rows
from scalellm.kernels.reference.w4a16 import dequantise_packed


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    library = select_ops(Capability(sm=0, num_sms=1), dtype=torch.float32).library
    if library is None:
        pytest.skip("there is no compiler")
    return library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_finite_are_found(library, dtype):
    for columns in (1, 15, 64, 100):
        x = torch.full((6, columns + 3), 3e38, dtype=dtype)[:, :columns]  # a sum would not be finite
        x[1, columns - 1], x[3, 0], x[4, columns // 2] = torch.inf, torch.nan, -torch.inf
        assert finite_rows(library, x).tolist() == [True, False, True, False, False, True]


def test_rows_are_gathered(library):
    matrix = torch.arange(7 * 19, dtype=torch.int32).view(7, 19)
    ids, out = torch.tensor([6, 0, 3, 3]), torch.zeros(5, 19, dtype=torch.int32)
    assert torch.equal(gather_rows(library, matrix, ids, out=out), matrix[ids])
    assert torch.equal(out, torch.cat((matrix[ids], torch.zeros(1, 19, dtype=torch.int32))))
    assert gather_rows(library, matrix, ids[:0], out=out).shape == (0, 19)
    for wrong in (-1, 7):
        with pytest.raises(ValueError, match=rf"ids\[1\] is {wrong}, there are 7 rows"):
            gather_rows(library, matrix, torch.tensor([0, wrong]), out=out)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [8, 32, 64, 136])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_those_of_the_dequantised_weight(library, bits, group_size, has_zeros, dtype):
    generator = torch.Generator().manual_seed(group_size)
    inputs, columns = group_size * 3, 70  # the last tile is not full
    words = torch.randint(-(2**31), 2**31, (inputs * bits // 32, columns), generator=generator).int()
    scales = torch.randn(3, columns, generator=generator).to(dtype)
    zeros = torch.rand(3, columns, generator=generator).mul(1 << bits).to(dtype) if has_zeros else None
    expected = dequantise_packed(words, scales, zeros, bits, group_size).T
    copies = (words.clone(), scales.clone(), None if zeros is None else zeros.clone())
    weight = TiledWeight(library, *copies, bits=bits, group_size=group_size)
    ids = torch.tensor([69, 0, 31, 32, 69])
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(weight.columns(ids).double(), expected[ids].double(), **tolerance)
    assert torch.equal(weight.columns(ids, scale=0.7), weight.columns(ids) * 0.7)
    for wrong in (-1, 70):
        with pytest.raises(ValueError, match=rf"ids\[0\] is {wrong}, there are 70 rows"):
            weight.columns(torch.tensor([wrong]))
