"""Programmatic dependent launch (Hopper and later): the launch of a kernel hides behind the end of the one before.

A kernel with the constexpr `OVERLAPS`, which `Launch` fills in, may begin while the kernel before it still runs. So its
first statement is `start_after_the_kernel_before`, and `make aot` refuses machine code that touches memory earlier.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start_after_the_kernel_before(OVERLAPS: tl.constexpr):
    """Wait until the kernel before has ended and its writes are seen, and let the next one be launched.

    Every program of every such kernel waits, so that a kernel that has ended means that all before it have.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
