"""Every variant that serving compiles, for the model shapes of the presets.

A case is named after its op and what is special about it; a new file of cases is added to `CASES`.
"""

from kernels.aot.cases import attention, cache, rope
from kernels.aot.recorder import Case

CASES: tuple[Case, ...] = (*attention.CASES, *cache.CASES, *rope.CASES)
