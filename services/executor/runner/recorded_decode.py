"""Decode steps on a CPU, each recorded when it first occurs and made as one call from then on."""

import torch
from torch import Tensor

from kernels.cpu.library import CpuLibrary
from kernels.cpu.recording import NotRecordableError, Recorder, Recording
from services.executor.models import CausalLM, ForwardContext, KVCache

_MAX_ROWS = 64  # a step of more takes so long that its calls do not count


class RecordedDecode:
    """Runs decode steps over a model's layers, with a recording per number of rows.

    The tensors of a step's context are at the same addresses whenever it has as many rows. Where a layer computes with
    torch, as dense weights are multiplied, nothing is recorded and every step runs op by op.
    """

    def __init__(self, model: CausalLM, kv_caches: list[KVCache], library: CpuLibrary | None) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._recorder = None if library is None else Recorder(library)
        self._stream = torch.empty((_MAX_ROWS, model.config.hidden_size), dtype=model.runtime.dtype)
        self._recordings: dict[int, Recording] = {}

    def forward(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        """Return the final hidden states `[D, H]`, good until the next step."""
        num_rows = input_ids.shape[0]
        if self._recorder is None or num_rows > _MAX_ROWS:
            return self._model.forward(input_ids, context, self._kv_caches)
        stream = self._stream[:num_rows]
        stream.copy_(self._model.embed(input_ids))
        recording = self._recordings.get(num_rows)
        if recording is not None:
            return recording.replay()
        try:
            recording = self._recorder.record(lambda: self._model.run_layers(stream, context, self._kv_caches))
        except NotRecordableError:
            self._recorder = None
            return self._model.forward(input_ids, context, self._kv_caches)
        self._recordings[num_rows] = recording
        return recording.result
