"""Code that the compiler makes for the matrix unit, whose results are tested in test_cpu_emulated.py."""

import re
import subprocess

import pytest

from scalellm.kernels.cpu import building

LEVEL = next(level for level in building.LEVELS if level.name == "amx")
SOURCE = """
#include <immintrin.h>
#if defined(CAREFUL)
#undef _tile_loadd
#undef _tile_loadconfig
#define _tile_loadd(tile, base, stride) \\
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(base), "r"(int64_t(stride)) : "memory")
#define _tile_loadconfig(at) __asm__ volatile("ldtilecfg (%0)" : : "r"(at) : "memory")
#endif
#include <algorithm>
#include "matrix_unit.h"

void multiply(const uint32_t* x, const uint32_t* weights, int64_t count, float* sums) {
  MatrixUnit unit;
  unit.begin(kUnitRows, kUnitWords);
  uint32_t words[kUnitWords * kUnitColumns] = {};
  std::copy_n(weights, count, words);
  unit.add<BFloat16, BFloat16>(x, 4 * kUnitWords, words);
  unit.store_sums(sums);
}
"""


def num_stores(source, *flags):
    """Return the number of instructions that write to the stack."""
    command = (building._compiler(), *building.FLAGS, *LEVEL.flags, *flags, f"-I{building.SOURCES}", "-S", "-o", "-")
    done = subprocess.run((*command, str(source)), capture_output=True, text=True, check=False)
    if "unrecognized" in done.stderr or "unknown" in done.stderr:
        pytest.skip("the compiler does not know the matrix unit")
    assert not done.returncode, done.stderr
    assert "ldtilecfg" in done.stdout
    return len(re.findall(r"^\t(?:v?mov\w+\t.*, -?\d*\(%r[sb]p\)|rep stos\w)$", done.stdout, re.MULTILINE))


def test_what_the_unit_loads_is_stored_before(tmp_path):
    """The intrinsics of g++ 12 do not say that they read memory: what only they read would be left out."""
    try:
        building._compiler()
    except OSError:
        pytest.skip("there is no compiler")
    source = tmp_path / "multiply.cpp"
    source.write_text(SOURCE)
    assert num_stores(source) >= num_stores(source, "-DCAREFUL") > 0
