"""Programmatic dependent launch (Hopper and later): the launch of a kernel hides behind the end of the one before.

A kernel with the constexpr `OVERLAPS`, which `Launch` fills in, may begin while the kernel before it still runs. So its
first statement is `start_after_the_kernel_before`, and `make aot` refuses machine code that touches memory earlier.

One thing may come before it: to have a weight brought into the second-level cache, while the kernel before is a small
one, or ends, and memory would have nothing to do. A kernel that streams a weight does so for the beginning of its own
(`fetch_ahead`, as CUTLASS in its example 63); for a product of torch's, the small kernel before it (`fetch_for_next`).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, num_warps

from scalellm.kernels.capability import Capability
from scalellm.kernels.launch import Launch
from scalellm.kernels.reference.quant import E4M3
from scalellm.kernels.workspaces import BYTES_AHEAD, ROWS_AHEAD

_PROGRAMS_PER_SM = 2  # of a kernel that streams a weight
_LINE = 128  # bytes
_PIECES: tl.constexpr = tl.constexpr(8)  # that a warp asks for before a product of torch's


@triton.jit
def start_after_the_kernel_before(OVERLAPS: tl.constexpr):
    """Wait until the kernel before has ended and its writes are seen, and let the next one be launched.

    Every program of every such kernel waits, so that a kernel that has ended means that all before it have.
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


def row_bytes_ahead(capability: Capability, weight: Tensor, rows_of_a_program: int, programs: int) -> int:
    """Return `WIDTH` of `fetch_ahead` for programs that stream so many whole rows of a weight [N, K] each."""
    at_once = min(programs, _PROGRAMS_PER_SM * capability.num_sms)
    share = BYTES_AHEAD // max(1, at_once * rows_of_a_program) // _LINE * _LINE
    return min(share, weight.shape[1] * weight.element_size())


@triton.jit
def fetch_ahead(
    weight,
    first_row,
    num_rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Have WIDTH bytes of each of ROWS rows of a weight [num_rows, K] brought into the second-level cache.

    This comes before the wait, so it must be a weight: no kernel writes those. Nothing is read into a register.
    """
    if OVERLAPS:
        WARPS: tl.constexpr = num_warps()
        EACH: tl.constexpr = ROWS // WARPS if ROWS > WARPS else 1
        SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        thread = tl.arange(0, 32 * WARPS)
        row = thread // 32 * EACH + thread % 32
        live = (thread % 32 < EACH) & (row < ROWS) & (first_row + row < num_rows)
        at = weight.to(tl.int64) + (first_row + row).to(tl.int64) * (K * SIZE)
        _fetch(at, tl.where(live, WIDTH // 16 * 16, 0))


def bytes_for_next(launch: Launch, weight: Tensor | None, rows: int, programs: int) -> int:
    """Return `share` of `fetch_for_next` in each of so many programs, before a product of so many rows.

    Products of our own fetch for themselves: all of fewer rows than `ROWS_AHEAD`, and some of e4m3 with more. Products
    of more rows do not wait for their weight.
    """
    if weight is None or not ROWS_AHEAD[0] <= rows <= ROWS_AHEAD[1]:
        return 0
    if weight.dtype == E4M3 and launch.tile("fp8_gemm", rows=rows, columns=weight.shape[0])["own"]:
        return 0
    return min(BYTES_AHEAD, weight.nbytes) // programs


@triton.jit
def fetch_for_next(weight, share, OVERLAPS: tl.constexpr):
    """Have this program's `share`, in bytes, of the beginning of a weight brought into the second-level cache."""
    if OVERLAPS and weight is not None:
        WARPS: tl.constexpr = num_warps()
        thread = tl.arange(0, 32 * WARPS)
        piece = share // (_PIECES * WARPS) // 16 * 16
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        part = (program * WARPS + thread // 32) * _PIECES + thread % 32
        _fetch(weight.to(tl.int64) + part.to(tl.int64) * piece, tl.where(thread % 32 < _PIECES, piece, 0))


@triton.jit
def _fetch(at, num_bytes):
    """Ask for some bytes each, of none where that is 0. A warp asks for one piece after the other: few are best."""
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.ne.u32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [at & -16, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
