"""Rotary position embeddings (RoFormer, arXiv 2104.09864): settings and the cos/sin table the kernels read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between the two."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class FrequencyFactors:
    """A divisor per frequency, `[head_dim / 2]`: how a GGUF file carries Llama 3's scaling (`rope_freqs.weight`)."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | FrequencyFactors


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer: base `theta` and, for stretched contexts, a scaling of the frequencies."""

    theta: float
    scaling: RopeScaling | None = None


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return the angular frequencies, float32 `[head_dim / 2]` on the CPU, in radians per position.

    They are a CPU's whatever the device: at position 100,000 the last bit of one is an angle of a hundredth.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case None:
            return inv_freq
        case LinearScaling(factor):
            return inv_freq / factor
        case FrequencyFactors(factors):
            return inv_freq / torch.tensor(factors, dtype=torch.float32)
        case Llama3Scaling() as scaling:
            return _llama3(inv_freq, scaling)


def _llama3(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    # How many full turns a frequency makes in the original context decides how much of it is kept.
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / scaling.factor + kept * inv_freq


def build_cos_sin_cache(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Return the table `[num_positions, head_dim]` float32 whose row p is cos(p * f) followed by sin(p * f).

    The angles are float32 products on purpose: that is what the models were trained with, and what `transformers`
    does, so that long contexts agree with it. The table stays float32 whatever the model's dtype.
    """
    if device.type == "meta":  # arithmetic on it would import torch's decompositions: 1.8 s
        return torch.empty(num_positions, head_dim, dtype=torch.float32, device=device)
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim).to(device))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
