"""Workloads that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.gpu.device import Call
from bench.gpu.roofline import Cost
from scalellm.kernels import Ops
from scalellm.kernels.spec.case import Maker


@dataclass(frozen=True, slots=True)
class Workload:
    """An op in one shape.

    Attributes:
        op: its name.
        shape: what a row of the table says.
        cost: what it has to do.
        bind: makes a set of inputs and returns the call.
        own: the same of torch's own, or None where torch has nothing like it; `own_name` says what it is.
        own_name: see `own`.
        target: least share of the ceiling that it has to reach, or None.
        kv_cache_dtype: for the choice of ops.
        min_sm: what the device must have.
        resident_bytes: memory of a set of inputs.
    """

    op: str
    shape: str
    cost: Cost
    bind: Callable[[Ops, Maker], Call]
    own: Callable[[Maker], Call] | None = None
    own_name: str = ""
    target: float | None = None
    kv_cache_dtype: torch.dtype | None = None
    min_sm: int = 80
    resident_bytes: float = 0.0

    @property
    def name(self) -> str:
        """Name of the workload, different from all others'."""
        return f"{self.op} {self.shape}"
