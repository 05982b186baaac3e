"""Turns a scheduled batch into the flattened tensors of a forward pass."""

import numpy as np
import torch
from torch import Tensor

from services.executor.engine.batch import ScheduledBatch, ScheduledSequence
from services.executor.engine.config import EngineConfig
from services.executor.models import DecodeRows, ForwardContext, PrefillRows


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
        D = batch.num_decodes
        cu_seqlens_q = self._cu_seqlens_q.numpy()
        cu_seqlens_q[0], cu_seqlens_q[1 : S - D + 1] = 0, ends[D:] - D

        input_ids = self._input_ids.numpy()
        input_ids[:D] = [s.seq.token_ids[s.start] for s in sequences[:D]]
        for s, end in zip(sequences[D:], ends[D:], strict=True):
            input_ids[end - s.num_tokens : end] = s.seq.token_ids[s.start : s.start + s.num_tokens]

        positions = self._positions.numpy()[:T]
        positions[:] = np.arange(T) + np.repeat(starts - ends + counts, counts)
        blocks = self._table_of_row[np.repeat(rows, counts), positions // self._block_size].astype(np.int64)
        self._slot_mapping.numpy()[:T] = blocks * self._block_size + positions % self._block_size
        self._seq_lens.numpy()[:S] = starts + counts
        np.take(self._table_of_row, rows, axis=0, out=self._block_tables.numpy()[:S], mode="clip")
        context = ForwardContext(
            positions=self._send(self._positions[:T]),
            slot_mapping=self._send(self._slot_mapping[:T]),
            decode=None if D == 0 else self._decode_rows(sequences[:D]),
            prefill=None if D == S else self._prefill_rows(sequences[D:], D),
        )
        return self._send(self._input_ids[:T]), context

    def _decode_rows(self, sequences: list[ScheduledSequence]) -> DecodeRows:
        D = len(sequences)
        return DecodeRows(
            seq_lens=self._send(self._seq_lens[:D]),
            block_table=self._send(self._block_tables[:D, : _longest_table(sequences)]),
        )

    def _prefill_rows(self, sequences: list[ScheduledSequence], num_decodes: int) -> PrefillRows:
        rows = slice(num_decodes, num_decodes + len(sequences))
        return PrefillRows(
            cu_seqlens_q=self._send(self._cu_seqlens_q[: len(sequences) + 1]),
            seq_lens=self._send(self._seq_lens[rows]),
            block_table=self._send(self._block_tables[rows, : _longest_table(sequences)]),
            max_seqlen_q=max(s.num_tokens for s in sequences),
        )

    def _buffer(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def _longest_table(sequences: list[ScheduledSequence]) -> int:
    return max(len(s.seq.block_table) for s in sequences)
