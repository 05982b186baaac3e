"""Device functions shared by the kernels that store e4m3."""

import triton
import triton.language as tl

from scalellm.kernels.reference.quant import MIN_SCALE

E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
_MIN_SCALE: tl.constexpr = tl.constexpr(MIN_SCALE)


@triton.jit
def to_e4m3(value, scale):
    """Return `value / scale` in e4m3, clamped: a value beyond the largest number of the format may become NaN.

    A NaN stays one, so that a sequence gone wrong is still seen to be.

    It is multiplied by the reciprocal, because a division for each element would take longer than its load. Within
    2**-23 of the midpoint between two codes that is not always the code of the reference.
    """
    scaled = value * tl.div_rn(1.0, scale)
    return tl.clamp(scaled, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def largest_as_scale(value, AXIS: tl.constexpr):
    """Return the scale that takes the largest magnitude along an axis of a float32 value to the largest e4m3."""
    return tl.maximum(tl.div_rn(tl.max(tl.abs(value), axis=AXIS), E4M3_MAX), _MIN_SCALE)


@triton.jit
def scale_of(scale, IN_MEMORY: tl.constexpr):
    """Return a static scale that was given as a number, or as a tensor of one element (`IN_MEMORY`)."""
    return tl.load(scale).to(tl.float32) if IN_MEMORY else scale
