"""Products with weights of floating point numbers in C++, against torch in float64."""

import pytest
import torch

from scalellm.kernels.cpu.gemm_dense import DTYPES, TiledMatrix
from scalellm.kernels.cpu.library import default_build_dir, load_library


@pytest.fixture(scope="module")
def library():
    found = load_library(default_build_dir())
    if found is None:
        pytest.skip("there is no compiler")
    return found


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "inputs"), [(64, 96), (32, 1), (7, 33), (150, 24), (33, 577), (40, 2048)])
def test_products(library, dtype, columns, inputs):
    matrix, bias, x = randn(columns, inputs).to(dtype), randn(columns, seed=1), randn(29, inputs, seed=2)
    if dtype == torch.bfloat16:
        x = x.bfloat16().float()  # some CPUs round inputs beside such weights
    weight = TiledMatrix(library, matrix.clone())
    exact = x.double() @ matrix.double().T
    bound = 1e-6 * (x.double().abs() @ matrix.double().abs().T + 1)
    got = weight.product(x)
    assert bool(((got.double() - exact).abs() <= bound).all())
    with_bias = weight.product(x, bias, out=torch.full((29, columns), float("nan")))
    assert torch.equal(with_bias, got + bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(library, dtype):
    weight, x = TiledMatrix(library, randn(97, 200).to(dtype)), randn(70, 200, seed=3)
    together = weight.product(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 64):
                for start in (0, 70 - rows):
                    assert torch.equal(weight.product(x[start : start + rows]), together[start : start + rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [64, 71])
def test_rows(library, dtype, num_rows):
    matrix = randn(num_rows, 50).to(dtype)
    weight, ids = TiledMatrix(library, matrix.clone()), torch.tensor([0, 17, num_rows - 1, 31, 32, 16])
    assert torch.equal(weight.rows(ids), matrix[ids].float())
    assert torch.equal(weight.rows(ids, scale=3.0), matrix[ids].float() * 3.0)
    with pytest.raises(ValueError, match=rf"ids\[1\] is {num_rows}, there are {num_rows} rows"):
        weight.rows(torch.tensor([0, num_rows]))


def test_the_memory_of_the_matrix_becomes_that_of_the_tiles(library):
    matrix = randn(64, 40)
    weight = TiledMatrix(library, matrix)
    matrix.zero_()
    assert not weight.product(randn(2, 40)).any()
