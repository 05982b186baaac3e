"""The counter-based noise of sampling on the device; the definition is in `kernels.reference.rng`.

The 24 integer bits are those of the reference. Their Gumbel variate is taken twice: in float32 for every token, to
about 1e-6, and in float64 for the few tokens that are left to compare.
"""

import triton
import triton.language as tl

_GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2: tl.constexpr = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _splitmix64(state, n):
    z = state + (n.to(tl.uint64) + 1) * _GOLDEN
    z = (z ^ (z >> 30)) * _MIX_1
    z = (z ^ (z >> 27)) * _MIX_2
    return z ^ (z >> 31)


@triton.jit
def noise_key(seed, position):
    """Return the key of a row from its seed and position, i64 each."""
    start = _splitmix64(seed.to(tl.uint64), tl.zeros([], tl.uint64))
    return _splitmix64(start, position)


@triton.jit
def noise_bits(key, token_ids):
    """Return the 24 bits of each token as i32."""
    return (_splitmix64(key, token_ids) >> 40).to(tl.int32)


@triton.jit
def gumbel32(bits):
    """Return -log(-log(u)) in float32, u = (bits + 0.5) / 2**24."""
    below = bits < 8388608
    u = tl.where(below, bits.to(tl.float32) + 0.5, 8388608.0) * 5.9604644775390625e-08
    # Where u > 1/2 the exact number in float32 is v = 1 - u, and -log(1 - v) = 2 atanh(v / (2 - v)).
    v = tl.where(below, 0.5, (16777215 - bits).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    s = v / (2.0 - v)
    q = s * s
    series = 0.06666666666666667 * q + 0.07692307692307693
    series = series * q + 0.09090909090909091
    series = series * q + 0.1111111111111111
    series = series * q + 0.14285714285714285
    series = series * q + 0.2
    series = series * q + 0.3333333333333333
    near_one = 2.0 * (s + s * q * series)
    return -tl.log(tl.where(below, -tl.log(u), near_one))


@triton.jit
def gumbel64(bits):
    """Return -log(-log(u)) in float64, as the reference."""
    u = (bits.to(tl.float64) + 0.5) * 5.9604644775390625e-08
    return -tl.log(-tl.log(u))
