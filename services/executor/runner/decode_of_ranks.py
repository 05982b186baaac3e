"""Decode steps on the CPUs of several ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from scalellm.kernels import SampleOutput
from scalellm.kernels.cpu.torch_mode import RowWatch
from scalellm.services.executor.models import CausalLM, ForwardContext, KVCache
from scalellm.services.executor.runner.decode_step import DecodeStep, finite_rows


class DecodeOfRanks:
    """Runs decode steps of a rank's share of a model op by op, since sums over all ranks cannot be recorded.

    With the first step the ranks agree on `has_equal_rows`, so all of them run it.
    """

    def __init__(self, model: CausalLM, kv_caches: list[KVCache]) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._has_equal_rows: bool | None = None

    @property
    def has_equal_rows(self) -> bool:
        """True once a step has shown that, on all ranks, no row's results depend on the other rows."""
        return bool(self._has_equal_rows)

    def run(
        self,
        num_rows: int,
        inputs: Callable[[int], tuple[Tensor, ForwardContext]],
        draw: Callable[[Tensor], SampleOutput] | None = None,
    ) -> DecodeStep:
        """Run a step; see `RecordedDecode.run`. Nothing is drawn, as that takes the logits of all ranks."""
        if self._has_equal_rows is not None:
            return _checked(*self._compute(*inputs(num_rows)))
        with RowWatch() as watch:
            step = self._compute(*inputs(num_rows))
        num_unequal = self._model.runtime.shard.collectives.all_reduce(torch.tensor([float(not watch.is_equal)]))
        self._has_equal_rows = not num_unequal.item()
        return _checked(*step)

    def _compute(self, input_ids: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden = self._model.forward(input_ids, context, self._kv_caches)
        return hidden, self._model.compute_logits(hidden)


def _checked(hidden: Tensor, logits: Tensor) -> DecodeStep:
    return DecodeStep(hidden, finite_rows(hidden), logits, drawn=None)
