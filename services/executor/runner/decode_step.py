"""Results of a step of the model."""

from typing import NamedTuple

import torch
from torch import Tensor

from scalellm.kernels import SampleOutput


class DecodeStep(NamedTuple):
    """Results of a step, valid until the next: hidden states `[R, H]`, whether each row is finite, logits, tokens.

    The rows are those of the decodes, or in a step with prompts all `T` tokens or the R ones from which tokens are
    drawn; `finite` always has all rows. The logits `[R, V]` f32, and the tokens drawn from them, are None where the
    step did not compute them.
    """

    hidden: Tensor
    finite: Tensor
    logits: Tensor | None
    drawn: SampleOutput | None


def finite_rows(hidden: Tensor) -> Tensor:
    """Return `[T]`, whether all of a row `[T, H]` is finite: a sum is not if one of its terms is not."""
    return hidden.sum(-1, dtype=torch.float32).isfinite()
