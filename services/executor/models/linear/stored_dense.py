"""Checkpoints in full precision whose 16-bit numbers are kept instead of being widened when they are loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from scalellm.services.executor.models.linear.checkpoint import (
    Borders,
    FilledWeight,
    commonest_projection,
    kinds_of_experts,
    plain_slots,
    prefix_of_experts,
)
from scalellm.services.executor.models.linear.dense import DenseWeight
from scalellm.services.executor.models.runtime import ModelRuntime, dtype_name

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StoredDense:
    """`dtypes` maps Hugging Face names of tensors to the dtypes that the checkpoint has them in."""

    is_choice: ClassVar[bool] = True

    dtypes: Mapping[str, torch.dtype]

    @cached_property
    def dense_dtype(self) -> torch.dtype:
        """The dtype of most tensors that are multiplied."""
        return commonest_projection(self.dtypes, torch.float32)

    @property
    def form(self) -> str:
        """The name of that dtype."""
        return dtype_name(self.dense_dtype)

    def borders(self, names: Iterable[str]) -> Borders:
        """Return that they may be divided anywhere."""
        return Borders()

    def build(self, parts: Mapping[str, int], in_features: int, runtime: ModelRuntime) -> FilledWeight | None:
        """Return the weight and its slots."""
        dtypes = {self.dtypes.get(f"{name}.weight") for name in parts}
        dtypes |= self._dtypes_of_experts.get(prefix_of_experts(next(iter(parts))), set())  # one op multiplies them all
        return build_half(parts, in_features, runtime, dtypes)

    @cached_property
    def _dtypes_of_experts(self) -> Mapping[str, set[torch.dtype]]:
        return kinds_of_experts(self.dtypes)


def build_half(
    parts: Mapping[str, int], in_features: int, runtime: ModelRuntime, dtypes: set[torch.dtype | None]
) -> FilledWeight | None:
    """Return a weight of the 16-bit dtype that all `parts` have, of `dtypes`, and its slots.

    None where they have no such dtype in common, or where C++ does not multiply it.
    """
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if dtype not in _HALVES or not DenseWeight.is_multiplied_in_cpp(runtime):
        return None
    weight = DenseWeight(sum(parts.values()), in_features, runtime, dtype=dtype)
    return weight, plain_slots(weight, parts, in_features)
