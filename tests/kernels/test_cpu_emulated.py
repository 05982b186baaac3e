"""Products and attention of every level of instructions, by the kernels' own sources on any x86-64 CPU with AVX2.

`emulated/immintrin.h` has the instructions that a CPU may lack.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from cpu_levels import rounds_inputs_to_bfloat16
from int8_case import Int8Case
from scalellm.kernels.cpu import building
from scalellm.kernels.cpu.attention import paged_attention_decode, unified_attention
from scalellm.kernels.cpu.expert_rows import RowsByExpert
from scalellm.kernels.cpu.gemm_dense import TiledMatrix
from scalellm.kernels.cpu.gemm_wna16 import TiledWeight
from scalellm.kernels.cpu.library import CpuLibrary
from scalellm.kernels.cpu.rope import qk_norm_rope_and_cache
from scalellm.kernels.dispatch import Ops
from scalellm.kernels.reference.w4a16 import dequantise_packed

pytestmark = pytest.mark.slow  # half a minute in the compiler per level

BASE, *EMULATED = building.LEVELS
FLAGS = (*building.FLAGS, "-O1", "-Wno-psabi", *BASE.flags, f"-I{Path(__file__).parent / 'emulated'}")
FORMS = {form.__name__: form for form in (paged_attention_decode, qk_norm_rope_and_cache, unified_attention)}
ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 70)


def macros(level):
    """Macros that compilers define for the features that a level has beyond BASE."""
    names = (name if name.startswith("amx") else name.replace("_", "") for name in level.needs - BASE.needs)
    return [f"-D__{name.upper()}__" for name in names]


def built(folder, *flags):
    if not building.cpu_features() >= BASE.needs:
        pytest.skip(f"the emulated instructions need {BASE.name}")
    try:
        compiler = building._compiler()
    except OSError:
        pytest.skip("there is no compiler")
    if "clang" in subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("clang's headers define other types")

    def compiled(source):
        to = str(folder / f"{source.stem}.o")
        subprocess.run([compiler, *FLAGS, *flags, "-c", "-o", to, str(source)], check=True)
        return to

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compiled, sorted(building.SOURCES.glob("*.cpp"))))
    subprocess.run([compiler, "-shared", "-pthread", "-o", str(folder / "emulated.so"), *objects], check=True)
    return folder / "emulated.so"


@pytest.fixture(scope="module", params=EMULATED, ids=lambda level: level.name)
def level(request):
    return request.param


@pytest.fixture(scope="module")
def path(level, tmp_path_factory):
    return built(tmp_path_factory.mktemp(level.name), *macros(level))


@pytest.fixture(scope="module")
def library(path, level):
    return CpuLibrary(path, level.name)


@pytest.fixture(scope="module")
def ops(library):
    """Attention and what writes its cache."""
    forms = {name: ("cpp", partial(function, library)) for name, function in FORMS.items()}
    return Ops(None, forms, library)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_passes_its_self_check(path):
    building.check(path)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(("group_size", "columns"), [(192, 70), (64, 40), (32, 7), (88, 33), (24, 32)])
def test_packed_products_are_exact_whatever_rows_are_beside(library, bits, has_zeros, group_size, columns):
    """Inputs are whole numbers of which each group has a 127, so they are bytes already."""
    inputs = 2 * group_size
    words = torch.randint(-(1 << 31), 1 << 31, (inputs * bits // 32, columns)).int()
    words[:, 0], words[:, 1] = 0, -1  # the least and the greatest numbers
    scales = randn(2, columns)
    zeros = (randn(2, columns, seed=1).abs() * (1 << bits - 1)).round() if has_zeros else None
    x = torch.randint(-127, 128, (max(ROWS), inputs)).float()
    x[:, ::group_size] = 127
    x[3], x[4] = 127, torch.where(torch.arange(inputs) % 2 == 0, 127, -127)
    weight = TiledWeight.of_copies(library, words, scales, zeros, bits=bits, group_size=group_size)
    matrix = dequantise_packed(words, scales, zeros, bits, group_size).double()
    got = weight.product(x)
    bound = 2e-6 * (x.double().abs() @ matrix.abs())
    assert bool(((got.double() - x.double() @ matrix).abs() <= bound).all())
    for rows in ROWS:
        assert torch.equal(weight.product(x[-rows:]), got[-rows:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "inputs"), [(70, 161), (64, 96), (7, 33), (32, 1), (33, 2)])
def test_dense_products_do_not_depend_on_the_rows_beside(library, level, dtype, columns, inputs):
    matrix, bias, x = randn(columns, inputs).to(dtype), randn(columns, seed=1), randn(max(ROWS), inputs, seed=2)
    weight = TiledMatrix(library, matrix.clone())
    is_rounded = dtype == torch.bfloat16 and rounds_inputs_to_bfloat16(level)
    rounded = x.bfloat16().double() if is_rounded else x.double()
    bound = 1e-6 * (rounded.abs() @ matrix.double().abs().T + 1)
    got = weight.product(x)
    assert bool(((got.double() - rounded @ matrix.double().T).abs() <= bound).all())
    assert torch.equal(weight.product(x, bias), got + bias)
    for rows in ROWS:
        assert torch.equal(weight.product(x[-rows:]), got[-rows:])
    ids = torch.tensor([columns - 1, 0, columns // 2])
    assert torch.equal(weight.rows(ids), matrix[ids].float())


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_rows_of_experts_are_those_of_each_expert_alone(library, kind):
    """Four experts: one has rows for vectors, one has none, and two have rows for the matrix unit."""
    counts, inputs = (3, 0, 40, 17), 128
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]).int()
    by_expert = RowsByExpert(torch.randperm(60).int(), starts, torch.zeros(60, 1).int())
    x = randn(60, inputs, seed=3)
    if kind == "dense":
        stack = randn(4, 64, inputs).bfloat16()
        stacked = TiledMatrix(library, stack.clone())
        alone = [TiledMatrix(library, matrix.clone()) for matrix in stack]
    else:
        words = torch.randint(-(1 << 31), 1 << 31, (4, inputs // 4, 64)).int()
        scales = randn(4, 2, 64, seed=1)
        options = {"bits": 8, "group_size": 64}
        stacked = TiledWeight.of_copies(library, words, scales, None, **options)
        alone = [TiledWeight.of_copies(library, words[i], scales[i], None, **options) for i in range(4)]
    got = stacked.product(x, by_expert=by_expert, from_tokens=True)
    rows = x[by_expert.tokens.long()].split(counts)
    expected = [weight.product(part) for weight, part in zip(alone, rows, strict=True)]
    assert torch.equal(got, torch.cat(expected))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("options", [{}, {"window": 30}, {"softcap": 3.0}])
def test_attention_of_prompts_against_the_definition(ops, head_dim, options):
    """The matrix unit computes prompts of 16 rows, queries times heads, or more. 7-bit weights set the tolerance."""
    case = Int8Case(ops, [1, 15, 16, 17, 64, 70, 150], head_dim=head_dim)
    torch.testing.assert_close(case.prompt(ops, **options).double(), case.expected(**options), atol=0.1, rtol=0.1)


def test_attention_of_a_row_does_not_depend_on_the_rows_beside(ops):
    """Rows of a prompt and of beginnings in common, which are computed together, are those of each row alone."""
    case = Int8Case(ops, [300] + [20] * 20)
    prompts = case.prompt(ops)
    for length in (1, 64, 65, 130, 256, 257, 300):
        alone = case.decode(ops, slice(length - 1, length), [length], case.table)
        assert torch.equal(alone[0], prompts[length - 1])
    table = torch.cat((case.table[:1, :16].expand(21, -1), case.table[:, :2]), dim=1)
    rows, lens = case.starts[1:].long() - 1, [256 + 20] * 21
    table[0] = case.table[0, : table.shape[1]]
    together = case.decode(ops, rows, lens, table)
    for s in range(len(lens)):
        alone = case.decode(ops, rows[s : s + 1], lens[s : s + 1], table[s : s + 1])
        assert torch.equal(alone[0], together[s])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("EMULATE_WRONG_WEIGHTS", "products with packed integers of 8 bits are wrong"),
        ("EMULATE_WRONG_INPUTS", "attention of many rows in 8 bits is not that of each row"),
        ("EMULATE_NO_STATE", "the operating system does not keep the state that it needs"),
    ],
)
def test_a_matrix_unit_that_is_not_what_it_should_be_is_found(tmp_path, fault, reason):
    wrong = built(tmp_path, *macros(EMULATED[-1]), f"-D{fault}")
    with pytest.raises(building.FaultyLibraryError, match=reason):
        building.check(wrong)
