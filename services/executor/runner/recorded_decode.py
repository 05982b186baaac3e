"""Decode steps on a CPU, each recorded when it first occurs and made as one call from then on."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cpu.library import CpuLibrary
from kernels.cpu.recording import NotRecordableError, Recorder, Recording
from kernels.cpu.rows import finite_rows
from services.executor.models import CausalLM, ForwardContext, KVCache

_MAX_ROWS = 64  # a step of more takes so long that its calls do not count


class DecodeStep(NamedTuple):
    """What a recorded step computes, good until the next: hidden states `[D, H]`, whether each is finite, logits.

    The logits `[D, V]` f32 are at the same address whenever there are as many rows; None: torch has to compute them.
    """

    hidden: Tensor
    finite: Tensor
    logits: Tensor | None


class RecordedDecode:
    """Runs decode steps of a model, with a recording per number of rows.

    The tensors of a step's inputs are at the same addresses whenever it has as many rows. Where a layer computes with
    torch, as dense weights are multiplied, nothing is recorded; where only the output projection does, all but that.
    """

    def __init__(self, model: CausalLM, kv_caches: list[KVCache], library: CpuLibrary | None) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._library = library
        self._recorder = None if library is None else Recorder(library)
        self._logits = torch.empty((_MAX_ROWS, model.config.vocab_size), dtype=torch.float32)
        self._recordings: dict[int, tuple[Recording[tuple[Tensor, Tensor]], Recording[Tensor] | None]] = {}

    def run(self, num_rows: int, inputs: Callable[[int], tuple[Tensor, ForwardContext]]) -> DecodeStep | None:
        """Run a step; None, and it is still to run, where steps of so many rows or of this model are not recorded.

        `inputs` returns input ids `[num_rows]` and context, and is called, and recorded, when the step first occurs.
        """
        if num_rows in self._recordings:
            layers, head = self._recordings[num_rows]
            return DecodeStep(*layers.replay(), None if head is None else head.replay())
        if self._recorder is None or num_rows > _MAX_ROWS:
            return None
        try:
            layers = self._recorder.record(lambda: self._run_layers(*inputs(num_rows)))
        except NotRecordableError:
            self._recorder = None
            return None
        try:
            head = self._recorder.record(lambda: self._compute_logits(layers.result[0]))
        except NotRecordableError:
            head = None
        self._recordings[num_rows] = layers, head
        return DecodeStep(*layers.result, None if head is None else head.result)

    def _run_layers(self, input_ids: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        assert self._library is not None
        hidden = self._model.forward(input_ids, context, self._kv_caches)
        return hidden, finite_rows(self._library, hidden)

    def _compute_logits(self, hidden: Tensor) -> Tensor:
        return self._model.compute_logits(hidden, out=self._logits[: hidden.shape[0]])
