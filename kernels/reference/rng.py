"""The counter-based noise of sampling: a pure function of (seed, position, token id).

Everything is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in arithmetic modulo 2**64, so a device kernel reproduces
the integers bit for bit:

    mix64(z):      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
                   z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                   return z ^ (z >> 31)                                 (>> is a logical shift)
    at(state, n):  return mix64(state + (n + 1) * 0x9E3779B97F4A7C15)   (output n of the generator seeded with `state`)

    key  = at(at(seed, 0), position)
    bits = at(key, token_id) >> 40                                      (24 bits)
    u    = (bits + 0.5) * 2**-24                                        (in (0, 1), both ends excluded)
    g    = -log(-log(u))                                                (Gumbel(0, 1), in [-2.86, 17.33])

Here g is computed in float64. In float32 `bits + 0.5` is exact below 2**23 only; above, take -log(u) as
-log1p(-(2**24 - bits - 0.5) * 2**-24), whose argument is exact there.

Integers are torch int64, which wraps; it has no logical shift, hence the masks.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

BITS = 24


def splitmix64(state: Tensor | int, n: Tensor) -> Tensor:
    """Return `at(state, n)` for int64 tensors (or one int64 state for all n)."""
    z = _two_rounds(state, n)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _two_rounds(state: Tensor | int, n: Tensor) -> Tensor:
    """Return `at(state, n)` without its last line, which leaves the upper 31 bits as they are."""
    z = n * _GOLDEN
    z += state
    z += _GOLDEN
    shifted = torch.empty_like(z)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        torch.bitwise_right_shift(z, shift, out=shifted)
        shifted &= (1 << (64 - shift)) - 1
        z ^= shifted
        z *= factor
    return z


def noise_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return the key of each row, [S] i64, from its seed and position [S] i64."""
    return splitmix64(splitmix64(seeds, torch.zeros_like(seeds)), positions)


def noise_bits(key: Tensor | int, token_ids: Tensor) -> Tensor:
    """Return the 24 bits of each token, i64, under its row's key."""
    return _two_rounds(key, token_ids).bitwise_right_shift_(64 - BITS).bitwise_and_((1 << BITS) - 1)


def gumbel(bits: Tensor) -> Tensor:
    """Return the Gumbel(0, 1) variate, f64, that the 24 bits stand for."""
    return bits.double().add_(0.5).mul_(2.0**-BITS).log_().neg_().log_().neg_()


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of sample `index` of a request, as a signed 64-bit integer.

    `sample` takes one seed per row; the n samples of one request must not share it, or they would be identical.
    Sample 0 does not get the request's seed itself. Any integers are accepted and taken modulo 2**64.
    """
    mask = (1 << 64) - 1
    z = (seed + (index + 1) * _GOLDEN) & mask
    z = ((z ^ (z >> 30)) * _MIX_1) & mask
    z = ((z ^ (z >> 27)) * _MIX_2) & mask
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
