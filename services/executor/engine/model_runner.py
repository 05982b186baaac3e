"""Runs a scheduled batch through the model: flattened inputs, forward, logits where needed, sampling."""

import numpy as np
import torch
from torch import Tensor

import kernels
from services.executor.engine.batch import Logprobs, SampledBatch, ScheduledBatch, ScheduledSequence
from services.executor.engine.config import EngineConfig
from services.executor.engine.sampler import Sampler, score_tokens
from services.executor.models import CausalLM, ForwardContext, KVCache

_PROMPT_LOGPROB_ROWS = 256  # logits rows held at once: a chunk's worth times the vocabulary would be gigabytes


class InputBuffers:
    """Host tensors that every step reuses, with numpy views to fill them.

    Block tables are kept per row and only their new entries are written; a step gathers the rows of its sequences.
    """

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        num_tokens, num_seqs = config.max_num_batched_tokens, config.max_num_seqs
        num_blocks = -(-config.max_model_len // config.block_size)
        self._device = device
        self._block_size = config.block_size
        self._input_ids = self._buffer(num_tokens, dtype=torch.int64)
        self._positions = self._buffer(num_tokens, dtype=torch.int64)
        self._slot_mapping = self._buffer(num_tokens, dtype=torch.int64)
        self._cu_seqlens_q = self._buffer(num_seqs + 1, dtype=torch.int32)
        self._seq_lens = self._buffer(num_seqs, dtype=torch.int32)
        self._block_tables = self._buffer(num_seqs, num_blocks, dtype=torch.int32)
        self._table_of_row = np.zeros((num_seqs, num_blocks), dtype=np.int32)

    def fill(self, batch: ScheduledBatch) -> tuple[Tensor, ForwardContext]:
        """Return (input ids `[T]`, context) of a batch; valid until the next call."""
        sequences, T, S = batch.sequences, batch.num_tokens, len(batch.sequences)
        for scheduled in sequences:
            table, first = scheduled.seq.block_table, scheduled.first_new_block
            if first < len(table):
                self._table_of_row[scheduled.seq.row, first : len(table)] = table[first:]

        rows = np.fromiter((s.seq.row for s in sequences), np.int64, S)
        starts = np.fromiter((s.start for s in sequences), np.int64, S)
        counts = np.fromiter((s.num_tokens for s in sequences), np.int64, S)
        ends = np.cumsum(counts)
        cu_seqlens_q = self._cu_seqlens_q.numpy()
        cu_seqlens_q[0], cu_seqlens_q[1 : S + 1] = 0, ends

        input_ids = self._input_ids.numpy()
        D = batch.num_decodes
        input_ids[:D] = [s.seq.token_ids[s.start] for s in sequences[:D]]
        for s, end in zip(sequences[D:], ends[D:], strict=True):
            input_ids[end - s.num_tokens : end] = s.seq.token_ids[s.start : s.start + s.num_tokens]

        positions = self._positions.numpy()[:T]
        positions[:] = np.arange(T) + np.repeat(starts - ends + counts, counts)
        blocks = self._table_of_row[np.repeat(rows, counts), positions // self._block_size].astype(np.int64)
        self._slot_mapping.numpy()[:T] = blocks * self._block_size + positions % self._block_size
        self._seq_lens.numpy()[:S] = starts + counts
        np.take(self._table_of_row, rows, axis=0, out=self._block_tables.numpy()[:S], mode="clip")
        width = max(len(s.seq.block_table) for s in sequences)
        context = ForwardContext(
            positions=self._send(self._positions[:T]),
            slot_mapping=self._send(self._slot_mapping[:T]),
            cu_seqlens_q=self._send(self._cu_seqlens_q[: S + 1]),
            seq_lens=self._send(self._seq_lens[:S]),
            block_table=self._send(self._block_tables[:S, :width]),
            max_seqlen_q=int(counts.max()),
        )
        return self._send(self._input_ids[:T]), context

    def _buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


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

    @torch.inference_mode()
    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (source, target), in every layer."""
        indices = torch.tensor(pairs, dtype=torch.int64, device=self._device)
        for k, v in self._kv_caches:
            kernels.copy_blocks_(k, v, indices)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> SampledBatch:
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
        return sampled

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
