"""The cos/sin table of rotary position embeddings that the kernels read."""

import math

import torch
from torch import Tensor

from scalellm.services.executor.model_config.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
)


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
    # The number of full turns of a frequency in the original context decides how much of it is kept.
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / scaling.factor + kept * inv_freq


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
