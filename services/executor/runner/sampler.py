"""Draws the step's tokens: per-row sampling state around the ops `apply_logits_processors_` and `sample`."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ReadOnlySequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalellm import kernels
from scalellm.services.executor.engine.batch import Logprobs, ScheduledSequence
from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.sequence import Sequence
from scalellm.services.executor.grammar import Masks
from scalellm.services.executor.runner.device import Device
from scalellm.services.executor.runner.logit_state import Bias, SeenTokens
from scalellm.services.executor.runner.staging import StagedArrays

_GREEDY_BELOW = 1e-5  # dividing by less overflows float32 logits to infinity
_PARAMETERS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seeds": torch.int64,
}
_PENALTIES = dict.fromkeys(("repetition", "frequency", "presence"), torch.float32)
_PLACES = {"logit_rows": torch.int64, "rows": torch.int64, "positions": torch.int64}


@dataclass(frozen=True)
class Draw:
    """Tokens on their way from the device: `[R]` i64, and log-probabilities for rows that asked for them.

    Read once an event recorded after `Sampler.sample` has passed.
    """

    token_ids: Tensor
    scores: tuple[Tensor, Tensor, Tensor] | None
    wanted: dict[int, int]

    def logprobs(self) -> dict[int, Logprobs]:
        """Return the log-probabilities of the raw logits, by place of those that asked for them."""
        if self.scores is None:
            return {}
        logprobs, top_ids, top_logprobs = (scores.tolist() for scores in self.scores)
        return {
            place: Logprobs(logprobs[place], list(zip(top_ids[place][:count], top_logprobs[place], strict=False)))
            for place, count in self.wanted.items()
        }


class Sampler:
    """Keeps the sampling parameters of every row; a step gathers those of its rows and changes nothing else."""

    def __init__(self, config: EngineConfig, device: Device, ops: kernels.Ops, masks: Masks) -> None:
        num_rows = config.max_num_seqs
        self._capacity = config.max_model_len
        self._device = device
        self._ops = ops
        self._of_row = {
            name: np.zeros(num_rows, _numpy_dtype(dtype)) for name, dtype in (_PARAMETERS | _PENALTIES).items()
        }
        self._staged = StagedArrays(
            device, {name: (num_rows, dtype) for name, dtype in (_PARAMETERS | _PENALTIES | _PLACES).items()}
        )
        self._workspace = torch.empty(
            kernels.sample_workspace_size(num_rows, config.vocab_size, config.max_logprobs),
            dtype=torch.int64,
            device=device.torch_device,
        )
        self._seen: dict[int, SeenTokens] = {}
        self._bias: dict[int, Bias] = {}
        # Rows that neither change their logits nor want log-probabilities, and whether all rows of a step are such.
        self._is_plain_row = np.ones(num_rows, np.bool_)
        self._is_plain = True
        self._is_hot = False
        self._masks = masks
        self._mask_rows = torch.from_numpy(self._masks.rows)
        self._is_masked = False

    def set_row(self, seq: Sequence) -> None:
        """Take over the sequence's parameters for its row, whatever the row held before."""
        row, params = seq.row, seq.group.request.sampling
        values = {
            "temperature": 0.0 if params.temperature < _GREEDY_BELOW else params.temperature,
            "top_k": min(params.top_k, 2**31 - 1),
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seeds": kernels.sample_seed(seq.group.seed, seq.index),
            "repetition": params.repetition_penalty,
            "frequency": params.frequency_penalty,
            "presence": params.presence_penalty,
        }
        for name, value in values.items():
            self._of_row[name][row] = value
        self._seen.pop(row, None)
        self._bias.pop(row, None)
        if params.has_penalties:
            self._seen[row] = SeenTokens(seq, self._capacity)
        if params.logit_bias or (params.min_tokens and not seq.group.request.grammar):
            self._bias[row] = Bias(seq)
        self._is_plain_row[row] = row not in self._seen and row not in self._bias and params.logprobs is None

    def fill(self, scheduled: list[ScheduledSequence], logit_rows: npt.NDArray[np.int64]) -> None:
        """Take over the R sequences that sample, and the row of each among the step's hidden states."""
        R = len(scheduled)
        arrays = self._staged.begin()
        rows = np.fromiter((s.seq.row for s in scheduled), np.int64, R)
        arrays["rows"][:R] = rows
        arrays["logit_rows"][:R] = logit_rows
        arrays["positions"][:R] = [s.position for s in scheduled]
        self._is_plain = all(self._is_plain_row[rows].tolist())
        self._is_hot = bool(self._of_row["temperature"][rows].any())
        for name in _PARAMETERS if self._is_plain else self._of_row:
            arrays[name][:R] = self._of_row[name][rows]
        self._staged.send()

    def mask(self, scheduled: list[ScheduledSequence]) -> Mapping[int, str]:
        """Compute the grammars' masks for the sequences of `fill`, all of whose tokens must be known.

        Returns the error messages of grammars, by place.
        """
        errors = self._masks.fill(scheduled)
        self._is_masked = any(one.seq.matcher is not None for one in scheduled)
        return errors

    def places(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the rows `[R]` of hidden states to compute logits of, and the rows `[R]` of the sequences."""
        return self._staged.tensors["logit_rows"][:count], self._staged.tensors["rows"][:count]

    @property
    def is_greedy(self) -> bool:
        """True if each row of `fill` and `mask` takes the largest of the unchanged logits, and needs no
        log-probabilities.
        """
        return self._is_plain and not self._is_masked and not self._is_hot

    @property
    def plain_draw(self) -> Callable[[Tensor], kernels.SampleOutput] | None:
        """A function that draws the tokens of `fill` and `mask` from logits `[R, V]` f32, which it may change; None if
        a row asks for more than a token.
        """
        if not self._is_plain:
            return None
        return self._draw_masked if self._is_masked else self._draw

    def sample(
        self, logits: Tensor, scheduled: list[ScheduledSequence], drawn: kernels.SampleOutput | None = None
    ) -> tuple[Tensor, Draw]:
        """Draw the next token of each sequence of `fill` from logits `[R, V]` f32, which may be changed.

        `drawn` is what `plain_draw` returned for them, if it was called. Returns the token ids `[R]` on the device, and
        what is on its way to the host.
        """
        if (draw := self.plain_draw) is not None:
            drawn = draw(logits) if drawn is None else drawn
            return drawn.token_ids, Draw(self._device.to_host(drawn.token_ids), None, {})
        wanted = {
            place: count
            for place, s in enumerate(scheduled)
            if (count := s.seq.group.request.sampling.logprobs) is not None
        }
        processors = self._bias_arguments(scheduled) | self._penalty_arguments(scheduled)
        if self._is_masked:
            processors["bitmask"] = self._bitmask(len(scheduled))
        raw = logits
        if processors:
            raw = logits.clone() if wanted else logits
            self._ops.apply_logits_processors_(logits, **processors)
        out = self._draw(logits, num_logprobs=max(wanted.values(), default=None), logprob_logits=raw)
        send = self._device.to_host
        scores = (send(out.logprobs), send(out.top_ids), send(out.top_logprobs)) if wanted else None
        return out.token_ids, Draw(send(out.token_ids), scores, wanted)

    def _draw_masked(self, logits: Tensor) -> kernels.SampleOutput:
        self._ops.apply_logits_processors_(logits, bitmask=self._bitmask(logits.shape[0]))
        return self._draw(logits)

    def _bitmask(self, count: int) -> Tensor:
        return self._device.to_device(self._mask_rows[:count])

    def _draw(
        self, logits: Tensor, *, num_logprobs: int | None = None, logprob_logits: Tensor | None = None
    ) -> kernels.SampleOutput:
        columns = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        return self._ops.sample(
            logits,
            *(self._staged.tensors[name][: logits.shape[0]] for name in columns),
            num_logprobs=num_logprobs,
            logprob_logits=logprob_logits,
            workspace=self._workspace,
        )

    def _bias_arguments(self, scheduled: list[ScheduledSequence]) -> dict[str, Tensor]:
        biased = [place for place, s in enumerate(scheduled) if s.seq.row in self._bias]
        if not biased:
            return {}
        current = [self._bias[scheduled[place].seq.row].current(scheduled[place].num_output_tokens) for place in biased]
        ids, values = zip(*current, strict=True)
        return {
            "bias_rows": self._flat([np.repeat(biased, [len(part) for part in ids])]),
            "bias_token_ids": self._flat(ids),
            "bias_values": self._flat(values),
        }

    def _penalty_arguments(self, scheduled: list[ScheduledSequence]) -> dict[str, Tensor]:
        penalised = [place for place, s in enumerate(scheduled) if s.seq.row in self._seen]
        if not penalised:
            return {}
        seen = [self._seen[scheduled[place].seq.row].update(scheduled[place].seq.token_ids) for place in penalised]
        ids, counts = zip(*seen, strict=True)
        of_rows = {name: self._staged.tensors[name][: len(scheduled)] for name in _PENALTIES}
        return {
            "seen_rows": self._flat([np.repeat(penalised, [len(part) for part in ids])]),
            "seen_token_ids": self._flat(ids),
            "seen_output_counts": self._flat(counts),
            "repetition_penalty": of_rows["repetition"],
            "frequency_penalty": of_rows["frequency"],
            "presence_penalty": of_rows["presence"],
        }

    def _flat(self, parts: ReadOnlySequence[npt.NDArray[Any]]) -> Tensor:
        return self._device.to_device(torch.from_numpy(np.concatenate(parts)))


def _numpy_dtype(dtype: torch.dtype) -> "np.dtype[Any]":
    return torch.empty(0, dtype=dtype).numpy().dtype
