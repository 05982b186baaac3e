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
class YarnScaling:
    """YaRN (arXiv 2309.00071): frequencies that turn seldom in the original context are divided by `factor`, those that
    turn often are kept, with a linear blend over the dimensions between; rotated vectors are multiplied by
    `attention_factor`.

    Attributes:
        factor: How many times longer the context is than the original one.
        original_max_position_embeddings: The context that the model was first trained with, in tokens.
        attention_factor: Multiplies queries and keys alike.
        beta_fast: Turns in the original context from which on a frequency is kept.
        beta_slow: Turns up to which it is divided.
        truncate: Begin and end the blend at whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class FrequencyFactors:
    """A divisor per frequency, `[head_dim / 2]`: how a GGUF file carries Llama 3's scaling (`rope_freqs.weight`)."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer: base `theta` and, for stretched contexts, a scaling of the frequencies."""

    theta: float
    scaling: RopeScaling | None = None

    @property
    def attention_factor(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0


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
        case YarnScaling() as scaling:
            return _yarn(rope.theta, inv_freq, scaling)


def _llama3(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    # How many full turns a frequency makes in the original context decides how much of it is kept.
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / scaling.factor + kept * inv_freq


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Return what the paper multiplies vectors by, so that attention is as sharp as in the original context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(theta: float, inv_freq: Tensor, scaling: YarnScaling) -> Tensor:
    head_dim = 2 * len(inv_freq)

    def dimension(turns: float) -> float:
        """The (fractional) frequency that makes so many turns in the original context."""
        return (
            head_dim
            * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last = last + 0.001 if first == last else last
    divided = ((torch.arange(len(inv_freq), dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return inv_freq / scaling.factor * divided + inv_freq * (1 - divided)


def build_cos_sin_cache(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """Return the table `[num_positions, head_dim]` float32 whose row p is cos(p * f) followed by sin(p * f).

    With YaRN both are multiplied by its attention factor.

    The angles are float32 products on purpose: that is what the models were trained with, and what `transformers`
    does, so that long contexts agree with it. The table stays float32 whatever the model's dtype.
    """
    if device.type == "meta":  # arithmetic on it would import torch's decompositions: 1.8 s
        return torch.empty(num_positions, head_dim, dtype=torch.float32, device=device)
    positions = torch.arange(num_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim).to(device))
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return table if rope.attention_factor == 1.0 else table * rope.attention_factor
