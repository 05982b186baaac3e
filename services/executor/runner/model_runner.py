"""Runs a scheduled batch through the model: flattened inputs, forward, logits where needed, sampling."""

import numpy as np
import torch
from torch import Tensor

import kernels
from services.executor.engine.batch import CompletedStep, Logprobs, SampledBatch, ScheduledBatch, ScheduledSequence
from services.executor.engine.config import EngineConfig
from services.executor.models import CausalLM, KVCache
from services.executor.runner.input_buffers import InputBuffers
from services.executor.runner.sampler import Sampler, score_tokens

_PROMPT_LOGPROB_ROWS = 256  # logits rows held at once: a chunk's worth times the vocabulary would be gigabytes


class ModelRunner:
    """Runs steps of one model on one device.

    The KV caches are the model's, one per layer, with `config.num_blocks` blocks of `config.block_size` slots.
    """

    def __init__(self, model: CausalLM, kv_caches: list[KVCache], config: EngineConfig, device: torch.device) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._device = device
        self._inputs = InputBuffers(config, device)
        self._sampler = Sampler(config.max_num_seqs, config.max_model_len, device)

    @property
    def overlaps(self) -> bool:
        """False: a step is done when it is launched."""
        return False

    @torch.inference_mode()
    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (source, target), in every layer."""
        indices = torch.tensor(pairs, dtype=torch.int64, device=self._device)
        for k, v in self._kv_caches:
            kernels.copy_blocks_(k, v, indices)

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> CompletedStep:
        """Run the model over the batch and sample; logits are computed for the rows that need them only."""
        for scheduled in batch.sequences:
            if scheduled.first_new_block == 0:
                self._sampler.set_row(scheduled.seq)
        input_ids, context = self._inputs.fill(batch)
        first_row = np.cumsum([0] + [s.num_tokens for s in batch.sequences])
        hidden = self._model.forward(input_ids, context, self._kv_caches)
        sampled = SampledBatch([], failed=self._failed_places(hidden, first_row))
        for place, scheduled in enumerate(batch.sequences):
            if scheduled.prompt_logprobs:
                first = int(first_row[place]) - scheduled.start
                sampled.prompt_logprobs[place] = self._score_prompt(hidden, scheduled, first)
        sampling = [place for place, scheduled in enumerate(batch.sequences) if scheduled.samples]
        if sampling:
            rows = torch.from_numpy(first_row[1:][sampling] - 1).to(self._device)
            logits = self._model.compute_logits(hidden[rows])
            seqs = [batch.sequences[place].seq for place in sampling]
            sampled.token_ids, sampled.logprobs = self._sampler.sample(logits, seqs)
        return CompletedStep(sampled)

    @staticmethod
    def _failed_places(hidden: Tensor, first_row: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> set[int]:
        finite = hidden.isfinite().all(-1)
        if bool(finite.all()):
            return set()
        bad_rows = (~finite).nonzero().flatten().cpu().numpy()
        return set((np.searchsorted(first_row, bad_rows, side="right") - 1).tolist())

    def _score_prompt(self, hidden: Tensor, scheduled: ScheduledSequence, first: int) -> list[Logprobs]:
        """Score the prompt tokens that follow the scheduled positions; position p is row `first + p` of `hidden`."""
        seq, positions = scheduled.seq, scheduled.prompt_logprobs
        num_top = seq.group.request.sampling.prompt_logprobs or 0
        entries: list[Logprobs] = []
        for start in range(positions.start, positions.stop, _PROMPT_LOGPROB_ROWS):
            stop = min(start + _PROMPT_LOGPROB_ROWS, positions.stop)
            logits = self._model.compute_logits(hidden[first + start : first + stop])
            targets = torch.tensor(seq.token_ids[start + 1 : stop + 1], device=self._device)
            entries += score_tokens(logits, targets, num_top)
        return entries
