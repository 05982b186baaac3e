"""Turns a scheduled batch into the flattened tensors of a forward pass."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CpuLibrary
from scalellm.services.executor.engine.batch import ScheduledBatch, ScheduledSequence
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.models import DecodeRows, ForwardContext, PrefillRows
from scalellm.services.executor.runner.block_tables import BlockTables
from scalellm.services.executor.runner.device import Device
from scalellm.services.executor.runner.staging import HostArrays, StagedArrays

_PENDING = -1  # stands for a token id that only the device knows


@dataclass(frozen=True)
class DecodeAttention:
    """The division of decode attention: the most shares of a sequence, and scratch for the most rows of a step."""

    num_splits: int
    workspace: Tensor


class InputBuffers:
    """The inputs of a step, in buffers that every step reuses.

    A step of decodes alone is described by one value per row, whose buffers have fixed places: `decode` may be captured
    in a graph and replayed after every `fill`. Any other step lays out its tokens in buffers as long as they are.
    """

    def __init__(
        self, config: EngineConfig, device: Device, attention: DecodeAttention, library: CpuLibrary | None
    ) -> None:
        T, S = config.max_num_batched_tokens, config.max_num_seqs
        self._device = device
        self._block_size = config.block_size
        self._attention = attention
        per_token = dict.fromkeys(("input_ids", "positions", "slot_mapping"), (T, torch.int64))
        self._tokens = StagedArrays(device, per_token)
        self._rows = StagedArrays(
            device,
            dict.fromkeys(("input_ids", "positions", "slot_mapping", "rows", "chunk_rows"), (S, torch.int64))
            | {"seq_lens": (S, torch.int32), "chunk_seq_lens": (S, torch.int32), "cu_seqlens_q": (S + 1, torch.int32)},
        )
        max_blocks = -(-config.max_model_len // config.block_size)
        self._tables = BlockTables(S, max_blocks, device, library)
        shape = (S, max_blocks)
        self._decode_tables = torch.zeros(shape, dtype=torch.int32, device=device.torch_device)
        self._chunk_tables = torch.zeros(shape, dtype=torch.int32, device=device.torch_device)
        self._last_token_of_row = torch.zeros(S, dtype=torch.int64, device=device.torch_device)

    def fill(self, batch: ScheduledBatch, num_rows: int) -> None:
        """Take over a batch; a step of decodes alone is padded to `num_rows` with rows that do nothing."""
        self._tables.update(batch.sequences)
        D = batch.num_decodes
        rows = self._rows.begin()
        decodes = batch.sequences[:D]
        of_decode = np.fromiter((s.seq.row for s in decodes), np.int64, D)
        starts = np.fromiter((s.start for s in decodes), np.int64, D)
        rows["rows"][:D] = of_decode
        rows["seq_lens"][:D] = starts + 1
        rows["input_ids"][:D] = [_input_id(s) for s in decodes]
        rows["positions"][:D] = starts
        rows["slot_mapping"][:D] = self._tables.slots(of_decode, starts, self._block_size)
        if num_rows > D:
            nothing = {"rows": 0, "seq_lens": 0, "input_ids": 0, "positions": 0, "slot_mapping": -1}
            for name, value in nothing.items():
                rows[name][D:num_rows] = value
        if len(batch.sequences) > D:
            self._fill_chunks(batch, rows)
        self._rows.send()

    def decode(self, num_rows: int) -> tuple[Tensor, ForwardContext]:
        """Return (input ids `[num_rows]`, context) of a step of decodes alone."""
        arrays = self._rows.tensors
        input_ids = self._known(arrays["input_ids"][:num_rows], num_rows)
        context = ForwardContext(
            positions=arrays["positions"][:num_rows],
            slot_mapping=arrays["slot_mapping"][:num_rows],
            decode=self._decode_rows(num_rows),
            prefill=None,
        )
        return input_ids, context

    def mixed(self, batch: ScheduledBatch) -> tuple[Tensor, ForwardContext]:
        """Return (input ids `[T]`, context) of a step with chunks."""
        tokens, T, D = self._tokens.tensors, batch.num_tokens, batch.num_decodes
        input_ids = tokens["input_ids"][:T]
        if D:
            input_ids[:D] = self._known(input_ids[:D], D)
        context = ForwardContext(
            positions=tokens["positions"][:T],
            slot_mapping=tokens["slot_mapping"][:T],
            decode=self._decode_rows(D) if D else None,
            prefill=self._prefill_rows(batch.sequences[D:]),
        )
        return input_ids, context

    def remember(self, rows: Tensor, token_ids: Tensor) -> None:
        """Keep the tokens `[R]` just sampled for rows `[R]`: the next step's inputs, before the host knows them."""
        self._last_token_of_row.scatter_(0, rows, token_ids)

    def _fill_chunks(self, batch: ScheduledBatch, rows: HostArrays) -> None:
        chunks, D, T = batch.sequences[batch.num_decodes :], batch.num_decodes, batch.num_tokens
        P = len(chunks)
        of_chunk = np.fromiter((s.seq.row for s in chunks), np.int64, P)
        starts = np.fromiter((s.start for s in chunks), np.int64, P)
        counts = np.fromiter((s.num_tokens for s in chunks), np.int64, P)
        ends = np.cumsum(counts)
        rows["chunk_rows"][:P] = of_chunk
        rows["chunk_seq_lens"][:P] = starts + counts
        rows["cu_seqlens_q"][0], rows["cu_seqlens_q"][1 : P + 1] = 0, ends
        tokens = self._tokens.begin()
        for name in ("input_ids", "positions", "slot_mapping"):
            tokens[name][:D] = rows[name][:D]
        for s, end in zip(chunks, ends, strict=True):
            tokens["input_ids"][D + end - s.num_tokens : D + end] = s.seq.token_ids[s.start : s.start + s.num_tokens]
        positions = tokens["positions"][D:T]
        positions[:] = np.arange(T - D) + np.repeat(starts - ends + counts, counts)
        tokens["slot_mapping"][D:T] = self._tables.slots(np.repeat(of_chunk, counts), positions, self._block_size)
        self._tokens.send()

    def _known(self, input_ids: Tensor, num_rows: int) -> Tensor:
        if not self._device.overlaps:
            return input_ids
        return torch.where(input_ids < 0, self._last_token_of_row[self._rows.tensors["rows"][:num_rows]], input_ids)

    def _decode_rows(self, num_rows: int) -> DecodeRows:
        return DecodeRows(
            seq_lens=self._rows.tensors["seq_lens"][:num_rows],
            block_table=self._tables.gather(self._rows.tensors["rows"][:num_rows], self._decode_tables),
            num_splits=self._attention.num_splits,
            workspace=self._attention.workspace,
        )

    def _prefill_rows(self, chunks: list[ScheduledSequence]) -> PrefillRows:
        arrays, P = self._rows.tensors, len(chunks)
        return PrefillRows(
            cu_seqlens_q=arrays["cu_seqlens_q"][: P + 1],
            seq_lens=arrays["chunk_seq_lens"][:P],
            block_table=self._tables.gather(arrays["chunk_rows"][:P], self._chunk_tables),
            max_seqlen_q=max(s.num_tokens for s in chunks),
        )


def _input_id(decode: ScheduledSequence) -> int:
    if decode.draft is not None:
        return decode.draft
    return _PENDING if decode.token_pending else decode.seq.token_ids[decode.start]
