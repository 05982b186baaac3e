"""Device functions shared by the kernels that store e4m3."""

import triton
import triton.language as tl

E4M3_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def to_e4m3(value, scale):
    """Return `value / scale` in e4m3, clamped: a value beyond the largest number of the format may become NaN.

    It is multiplied by the reciprocal, because a division for each element would take longer than its load. Within
    2**-23 of the midpoint between two codes that is not always the code of the reference.
    """
    scaled = value * tl.div_rn(1.0, scale)
    return tl.minimum(tl.maximum(scaled, -E4M3_MAX), E4M3_MAX).to(tl.float8e4nv)


@triton.jit
def scale_of(scale, IN_MEMORY: tl.constexpr):
    """Return a static scale that was given as a number, or as a tensor of one element (`IN_MEMORY`)."""
    return tl.load(scale).to(tl.float32) if IN_MEMORY else scale
