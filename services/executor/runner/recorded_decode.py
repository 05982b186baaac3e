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
        self._has_head = True
        self._recordings: dict[int, Recording[DecodeStep]] = {}

    def run(self, num_rows: int, inputs: Callable[[int], tuple[Tensor, ForwardContext]]) -> DecodeStep | None:
        """Run a step; None, and it is still to run, where steps of so many rows or of this model are not recorded.

        `inputs` returns input ids `[num_rows]` and context, and is called, and recorded, when the step first occurs.
        """
        if (recording := self._recordings.get(num_rows)) is not None:
            return recording.replay()
        while self._recorder is not None and num_rows <= _MAX_ROWS:
            try:
                self._recordings[num_rows] = self._recorder.record(lambda: self._run(*inputs(num_rows)))
            except NotRecordableError:
                if self._has_head:
                    self._has_head = False  # it may be the one that torch computes: then all but that is recorded
                else:
                    self._recorder = None
            else:
                return self._recordings[num_rows].result
        return None

    def _run(self, input_ids: Tensor, context: ForwardContext) -> DecodeStep:
        assert self._library is not None
        hidden = self._model.forward(input_ids, context, self._kv_caches)
        finite = finite_rows(self._library, hidden)
        logits = self._model.compute_logits(hidden, out=self._logits[: hidden.shape[0]]) if self._has_head else None
        return DecodeStep(hidden, finite, logits)
