"""Decode steps on a CPU, which are recorded before serving or at their first occurrence, and then replayed as one
call."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from scalellm.kernels import SampleOutput
from scalellm.kernels.cpu.library import CpuLibrary
from scalellm.kernels.cpu.recording import NotRecordableError, Recorder, Recording
from scalellm.kernels.cpu.rows import finite_rows
from scalellm.services.executor.models import CausalLM, ForwardContext, KVCache
from scalellm.services.executor.runner.decode_step import DecodeStep

_NUM_PARTS = 3  # of a step: layers, output projection, draws
_MAX_ROWS = 64  # a step of more takes so long that its calls do not count


class RecordedDecode:
    """Runs decode steps of a model, with a recording per number of rows: layers, output projection and draws.

    The tensors of a step's inputs are at the same addresses whenever it has as many rows. Where a layer computes with
    torch, as experts with e4m3 weights do, nothing is recorded; where the output projection does, no more than layers.
    """

    def __init__(self, model: CausalLM, kv_caches: list[KVCache], library: CpuLibrary | None) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._library = library
        self._recorder = None if library is None else Recorder(library)
        self._logits = torch.empty((_MAX_ROWS, model.config.vocab_size), dtype=torch.float32)
        self._num_parts = _NUM_PARTS  # of a step that are recorded, from the layers on
        self._recordings: dict[tuple[int, Callable[[Tensor], SampleOutput] | None], Recording[DecodeStep]] = {}

    @property
    def has_equal_rows(self) -> bool:
        """True once a step was recorded with all its parts, in which no row's result depends on the other rows."""
        return bool(self._recordings) and self._num_parts == _NUM_PARTS

    def run(
        self,
        num_rows: int,
        inputs: Callable[[int], tuple[Tensor, ForwardContext]],
        draw: Callable[[Tensor], SampleOutput] | None = None,
    ) -> DecodeStep | None:
        """Run a step. Returns None, without having run it, if steps with this number of rows or of this model are not
        recorded.

        `inputs` returns input ids `[num_rows]` and context, `draw` draws from logits that are at the same address
        whenever there are as many rows. Both are called, and recorded, when the step first occurs with that `draw`.
        """
        if (recording := self._recordings.get((num_rows, draw))) is not None:
            return recording.replay()
        recording = self._record(num_rows, inputs, draw, makes_calls=True)
        return None if recording is None else recording.result

    def prepare(
        self,
        most_rows: int,
        inputs: Callable[[int], tuple[Tensor, ForwardContext]],
        draw: Callable[[Tensor], SampleOutput] | None,
        limit: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> int:
        """Record steps before they occur, without running them: those of one row, of two, and so on up to `most_rows`.

        Takes about `limit` seconds at most. Returns the largest number of rows that was recorded. `inputs` and `draw`
        are as for `run`; the values of the inputs do not matter.
        """
        end = clock() + limit
        for num_rows in range(1, most_rows + 1):
            if clock() >= end or self._record(num_rows, inputs, draw, makes_calls=False) is None:
                return num_rows - 1
        return most_rows

    def _record(
        self,
        num_rows: int,
        inputs: Callable[[int], tuple[Tensor, ForwardContext]],
        draw: Callable[[Tensor], SampleOutput] | None,
        *,
        makes_calls: bool,
    ) -> Recording[DecodeStep] | None:
        while self._recorder is not None and num_rows <= _MAX_ROWS:
            try:
                recording = self._recorder.record(lambda: self._run(*inputs(num_rows), draw), makes_calls=makes_calls)
            except NotRecordableError:
                self._num_parts -= 1  # the last one may be all that torch computes
                if self._num_parts == 0:
                    self._recorder = None
            else:
                self._recordings[num_rows, draw] = recording
                return recording
        return None

    def _run(
        self, input_ids: Tensor, context: ForwardContext, draw: Callable[[Tensor], SampleOutput] | None
    ) -> DecodeStep:
        assert self._library is not None
        hidden = self._model.forward(input_ids, context, self._kv_caches)
        finite = finite_rows(self._library, hidden)
        if self._num_parts < 2:
            return DecodeStep(hidden, finite, logits=None, drawn=None)
        logits = self._model.compute_logits(hidden, out=self._logits[: input_ids.shape[0]])
        drawn = None if draw is None or self._num_parts < _NUM_PARTS else draw(logits)
        return DecodeStep(hidden, finite, logits, drawn)
