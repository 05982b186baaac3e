"""Products with packed integers in C++, against float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scalellm import kernels
from scalellm.kernels import Capability, Ops, select_ops
from scalellm.kernels.cpu.gemm_wna16 import TiledWeight
from scalellm.kernels.reference.w4a16 import dequantise_packed
from scalellm.kernels.spec.gemm_wna16 import rounded_to_bytes

CPU = Capability(sm=0, num_sms=1)


def ops_for(dtype: torch.dtype) -> Ops:
    ops = select_ops(CPU, dtype=dtype)
    if ops.backends["w8a16_gemm"] != "cpp":
        pytest.skip("there is no compiler")
    return ops


def weight(bits: int, k: int, n: int, group_size: int, dtype: torch.dtype, has_zeros: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(1 << 31), 1 << 31, (k * bits // 32, n), generator=generator).int()
    scales = torch.randn(k // group_size, n, generator=generator).to(dtype)
    zeros = torch.rand(k // group_size, n, generator=generator).mul(1 << bits).to(dtype) if has_zeros else None
    return words, scales, zeros


LONG_ROWS = {"dtype": torch.float32, "rows": 14, "n": 40, "groups": 64, "has_zeros": True, "seed": 0}
"""4,096 inputs: the rows of bytes lie further apart then than they are long."""


@settings(max_examples=40)
@example(bits=8, words_per_group=16, **LONG_ROWS)
@example(bits=4, words_per_group=8, **LONG_ROWS)
@given(
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.integers(0, 20),
    n=st.integers(1, 150),
    groups=st.integers(1, 4),
    words_per_group=st.integers(1, 12),
    has_zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_float64_and_rows_do_not_depend_on_each_other(
    bits, dtype, rows, n, groups, words_per_group, has_zeros, seed
):
    ops = ops_for(dtype)
    group_size = words_per_group * 32 // bits
    words, scales, zeros = weight(bits, groups * group_size, n, group_size, dtype, has_zeros, seed)
    x = torch.randn(rows, groups * group_size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    gemm = ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm
    got = gemm(x, words, scales, zeros, group_size=group_size)
    matrix = dequantise_packed(words, scales, zeros, bits, group_size).double()
    # A number within float32's error of half way may be rounded to the other side.
    tolerance = 2e-3 if dtype == torch.float32 else 6e-3
    rounded = rounded_to_bytes(x, group_size)
    bound = tolerance * (rounded.abs() @ matrix.abs()) + 1e-30
    assert bool(((got.double() - rounded @ matrix).abs() <= bound).all())
    for row in range(rows):
        assert torch.equal(gemm(x[row : row + 1], words, scales, zeros, group_size=group_size)[0], got[row])


@pytest.mark.parametrize("rows", [33, 101])
@pytest.mark.parametrize("bits", [4, 8])
def test_threads_and_rows_beside_change_nothing_and_out_is_filled(bits, rows):
    ops = ops_for(torch.float32)
    words, scales, zeros = weight(bits, 256, 3001, 64, torch.float32, True, 0)
    x, out = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)), torch.full((rows, 3001), torch.nan)
    gemm = ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gemm(x, words, scales, zeros, group_size=64)
        torch.set_num_threads(4)
        assert gemm(x, words, scales, zeros, group_size=64, out=out) is out
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, alone)
    for row in range(0, rows, 16):
        assert torch.equal(gemm(x[row : row + 1], words, scales, zeros, group_size=64)[0], out[row])


@pytest.mark.parametrize("n", [33, 64, 5])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_kept_in_tiles_multiplies_alike_and_gives_its_columns_back(bits, n):
    ops = ops_for(torch.float32)
    plain = weight(bits, 96, n, 32, torch.float32, True, 0)
    kept = TiledWeight(ops.library, *(part.clone() for part in plain), bits=bits, group_size=32)
    x, columns = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)), torch.tensor([n - 1, 0, 4])
    gemm = ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm
    assert torch.equal(kept.product(x), gemm(x, *plain, group_size=32))
    torch.testing.assert_close(kept.columns(columns), dequantise_packed(*plain, bits, 32)[:, columns].T)


def test_callers_at_once_do_not_meet():
    ops = ops_for(torch.float32)
    words, scales, _ = weight(8, 256, 512, 64, torch.float32, False, 0)
    kept = TiledWeight(ops.library, words, scales, None, bits=8, group_size=64)
    inputs = [torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)) for rows in (1, 5, 17, 40)]
    alone = [kept.product(x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            together = list(threads.map(kept.product, inputs))
            assert all(map(torch.equal, together, alone))


def test_zeros_infinities_and_nans():
    ops = ops_for(torch.float32)
    words, scales, _ = weight(8, 64, 16, 32, torch.float32, False, 0)
    x = torch.zeros(3, 64)
    x[1, 40], x[2, 3] = torch.inf, torch.nan
    got = ops.w8a16_gemm(x, words, scales, None, group_size=32)
    assert torch.equal(got[0], torch.zeros(16))
    assert not got[1:].isfinite().any()


def test_what_the_form_does_not_take_goes_to_torch():
    ops = ops_for(torch.float32)
    words, scales, zeros = weight(8, 64, 16, 2, torch.float32, True, 0)
    x = torch.randn(3, 64)
    for args, group_size in (((words, scales, zeros), 2), ((words, scales[::16].half(), None), 32)):
        expected = kernels.w8a16_gemm(x, *args, group_size=group_size)
        assert torch.equal(ops.w8a16_gemm(x, *args, group_size=group_size), expected)
    with pytest.raises(ValueError, match="scales: shape"):
        ops.w8a16_gemm(x, words, scales, zeros, group_size=32)
