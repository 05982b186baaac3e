"""Settings of rotary position embeddings (RoFormer, arXiv 2104.09864)."""

import math
from dataclasses import dataclass


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
        factor: Length of the context, divided by that of the original one.
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
        """The factor of rotated queries and keys."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Return what the paper multiplies vectors by, so that attention is as sharp as in the original context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
