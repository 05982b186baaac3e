"""Results of a decode step."""

from typing import NamedTuple

import torch
from torch import Tensor

from scalellm.kernels import SampleOutput


class DecodeStep(NamedTuple):
    """Results of a step, valid until the next: hidden states `[D, H]`, whether each is finite, logits, tokens.

    The logits `[D, V]` f32, and what was drawn from them, are None where the step did not compute them.
    """

    hidden: Tensor
    finite: Tensor
    logits: Tensor | None
    drawn: SampleOutput | None


def finite_rows(hidden: Tensor) -> Tensor:
    """Return `[T]`, whether all of a row `[T, H]` is finite: a sum is not if one of its terms is not."""
    return hidden.sum(-1, dtype=torch.float32).isfinite()
