"""Facts about levels of CPU instructions that results depend on."""

from scalellm.kernels.cpu.building import LEVELS, Level
from scalellm.kernels.cpu.library import CpuLibrary


def rounds_inputs_to_bfloat16(level: Level) -> bool:
    """True if inputs of weights in bfloat16 are rounded to bfloat16 as well."""
    return "avx512_bf16" in level.needs


def library_rounds_inputs_to_bfloat16(library: CpuLibrary) -> bool:
    """The same of the level that a library is compiled for."""
    return any(level.name == library.level and rounds_inputs_to_bfloat16(level) for level in LEVELS)
