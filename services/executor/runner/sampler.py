"""Draws the step's tokens: per-row sampling state around `kernels.apply_logits_processors_` and `kernels.sample`."""

from collections.abc import Sequence as ReadOnlySequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import kernels
from services.executor.engine.batch import Logprobs
from services.executor.engine.sequence import Sequence

_Ids = npt.NDArray[np.int64]
_Counts = npt.NDArray[np.int32]
_Values = npt.NDArray[np.float32]
_GREEDY_BELOW = 1e-5  # dividing by less overflows float32 logits to infinity


class SeenTokens:
    """The distinct tokens of one sequence with their counts in the output, grown in place: O(1) per new token."""

    def __init__(self, seq: Sequence, capacity: int) -> None:
        self._slots: dict[int, int] = {}
        self._ids: _Ids = np.zeros(capacity, np.int64)
        self._counts: _Counts = np.zeros(capacity, np.int32)
        num_prompt = seq.group.num_prompt_tokens
        # Presence and frequency penalties are about the output alone; only repetition looks at the prompt.
        if seq.group.request.sampling.repetition_penalty != 1.0:
            distinct = list(dict.fromkeys(seq.token_ids[:num_prompt]))
            self._slots = {token_id: slot for slot, token_id in enumerate(distinct)}
            self._ids[: len(distinct)] = distinct
        self._num_noted = num_prompt

    def update(self, token_ids: ReadOnlySequence[int]) -> tuple[_Ids, _Counts]:
        """Note the output tokens since the last call; return (ids `[K]`, counts in the output `[K]`)."""
        for index in range(self._num_noted, len(token_ids)):
            token_id = token_ids[index]
            slot = self._slots.get(token_id)
            if slot is None:
                slot = self._slots[token_id] = len(self._slots)
                self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_noted = len(token_ids)
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]


class Bias:
    """The logit bias of one sequence, with and without the ban on stop tokens that min_tokens asks for."""

    def __init__(self, seq: Sequence) -> None:
        group = seq.group
        plain = dict(group.request.sampling.logit_bias)
        banned = plain | dict.fromkeys(group.stop_ids, float("-inf"))
        self._min_tokens = group.request.sampling.min_tokens
        self._plain = (np.array(list(plain), np.int64), np.array(list(plain.values()), np.float32))
        self._banned = (np.array(list(banned), np.int64), np.array(list(banned.values()), np.float32))

    def current(self, num_output_tokens: int) -> tuple[_Ids, _Values]:
        """Return (token ids `[B]`, values `[B]`) for the next token."""
        return self._banned if num_output_tokens < self._min_tokens else self._plain


class Sampler:
    """Keeps the sampling parameters of every row in tensors; a step gathers its rows and changes nothing else.

    capacity: most tokens that a sequence may have. State lives on the host; what the device needs is sent per step.
    """

    def __init__(self, num_rows: int, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        self._device = device
        self._temperature = torch.zeros(num_rows)
        self._top_k = torch.zeros(num_rows, dtype=torch.int64)
        self._top_p = torch.ones(num_rows)
        self._min_p = torch.zeros(num_rows)
        self._seeds = torch.zeros(num_rows, dtype=torch.int64)
        self._repetition = torch.ones(num_rows)
        self._frequency = torch.zeros(num_rows)
        self._presence = torch.zeros(num_rows)
        self._seen: dict[int, SeenTokens] = {}
        self._bias: dict[int, Bias] = {}

    def set_row(self, seq: Sequence) -> None:
        """Take over the sequence's parameters for its row, whatever the row held before."""
        row, params = seq.row, seq.group.request.sampling
        self._temperature[row] = 0.0 if params.temperature < _GREEDY_BELOW else params.temperature
        self._top_k[row] = min(params.top_k, 2**31 - 1)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seeds[row] = kernels.sample_seed(seq.group.seed, seq.index)
        self._repetition[row] = params.repetition_penalty
        self._frequency[row] = params.frequency_penalty
        self._presence[row] = params.presence_penalty
        self._seen.pop(row, None)
        self._bias.pop(row, None)
        if params.has_penalties:
            self._seen[row] = SeenTokens(seq, self._capacity)
        if params.logit_bias or params.min_tokens:
            self._bias[row] = Bias(seq)

    def sample(self, logits: Tensor, seqs: list[Sequence]) -> tuple[list[int], dict[int, Logprobs]]:
        """Draw the next token of each sequence from logits `[S, V]` f32, which may be changed.

        Returns the token ids, and the log-probabilities (of the raw logits) by place of those that asked for them.
        """
        rows = torch.tensor([seq.row for seq in seqs])
        wanted = {
            place: count for place, seq in enumerate(seqs) if (count := seq.group.request.sampling.logprobs) is not None
        }
        processors = self._bias_arguments(seqs) | self._penalty_arguments(seqs, rows)
        raw = logits
        if processors:
            raw = logits.clone() if wanted else logits
            kernels.apply_logits_processors_(logits, **processors)
        out = kernels.sample(
            logits,
            self._send(self._temperature[rows]),
            self._send(self._top_k[rows]),
            self._send(self._top_p[rows]),
            self._send(self._min_p[rows]),
            self._send(self._seeds[rows]),
            self._send(torch.tensor([len(seq.token_ids) for seq in seqs])),
            num_logprobs=max(wanted.values(), default=0),
            logprob_logits=raw,
        )
        return out.token_ids.tolist(), self._logprobs(out, wanted)

    def _bias_arguments(self, seqs: list[Sequence]) -> dict[str, Tensor]:
        biased = [place for place, seq in enumerate(seqs) if seq.row in self._bias]
        if not biased:
            return {}
        current = [self._bias[seqs[place].row].current(seqs[place].num_output_tokens) for place in biased]
        ids, values = zip(*current, strict=True)
        return {
            "bias_rows": self._flat([np.repeat(biased, [len(part) for part in ids])]),
            "bias_token_ids": self._flat(ids),
            "bias_values": self._flat(values),
        }

    def _penalty_arguments(self, seqs: list[Sequence], rows: Tensor) -> dict[str, Tensor]:
        penalised = [place for place, seq in enumerate(seqs) if seq.row in self._seen]
        if not penalised:
            return {}
        seen = [self._seen[seqs[place].row].update(seqs[place].token_ids) for place in penalised]
        ids, counts = zip(*seen, strict=True)
        return {
            "seen_rows": self._flat([np.repeat(penalised, [len(part) for part in ids])]),
            "seen_token_ids": self._flat(ids),
            "seen_output_counts": self._flat(counts),
            "repetition_penalty": self._send(self._repetition[rows]),
            "frequency_penalty": self._send(self._frequency[rows]),
            "presence_penalty": self._send(self._presence[rows]),
        }

    def _logprobs(self, out: kernels.SampleOutput, wanted: dict[int, int]) -> dict[int, Logprobs]:
        if not wanted:
            return {}
        logprobs, top_ids, top_logprobs = out.logprobs.tolist(), out.top_ids.tolist(), out.top_logprobs.tolist()
        return {
            place: Logprobs(logprobs[place], list(zip(top_ids[place][:count], top_logprobs[place], strict=False)))
            for place, count in wanted.items()
        }

    def _flat(self, parts: ReadOnlySequence[npt.NDArray[Any]]) -> Tensor:
        return self._send(torch.from_numpy(np.concatenate(parts)))

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def score_tokens(logits: Tensor, token_ids: Tensor, num_top: int) -> list[Logprobs]:
    """Return the log-probability of given tokens `[R]` i64 under raw logits `[R, V]` f32, with `num_top` others."""
    log_z = logits.logsumexp(-1)
    logprobs = (logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) - log_z).tolist()
    top = logits.topk(num_top)
    top_logprobs = (top.values - log_z.unsqueeze(1)).tolist()
    return [
        Logprobs(logprob, list(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(logprobs, top.indices.tolist(), top_logprobs, strict=True)
    ]
