"""Log-probabilities of prompt tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalellm.services.executor.engine.batch import Logprobs, ScheduledSequence
from scalellm.services.executor.models import CausalLM
from scalellm.services.executor.runner.device import Device

_ROWS = 256  # logits rows held at once: a chunk's worth times the vocabulary would be gigabytes


@dataclass(frozen=True)
class PromptScores:
    """Scores of one sequence on their way from the device; read once an event recorded after `score` has passed.

    parts: per piece of the chunk the log-probabilities `[R]`, the most likely ids `[R, k]` and theirs `[R, k]`.
    """

    parts: list[tuple[Tensor, Tensor, Tensor]]

    def entries(self) -> list[Logprobs]:
        """Return one entry per position."""
        return [
            Logprobs(logprob, list(zip(ids, values, strict=True)))
            for part in self.parts
            for logprob, ids, values in zip(*(scores.tolist() for scores in part), strict=True)
        ]


def score_prompt(
    model: CausalLM, hidden: Tensor, first: int, scheduled: ScheduledSequence, device: Device
) -> PromptScores:
    """Score the prompt tokens that follow the scheduled positions; position p is row `first + p` of `hidden`."""
    seq, positions = scheduled.seq, scheduled.prompt_logprobs
    num_top = seq.group.request.sampling.prompt_logprobs or 0
    parts = []
    for start in range(positions.start, positions.stop, _ROWS):
        stop = min(start + _ROWS, positions.stop)
        logits = model.joined(model.compute_logits(hidden[first + start : first + stop]))
        targets = device.to_device(torch.tensor(seq.token_ids[start + 1 : stop + 1]))
        log_z = logits.logsumexp(-1)
        logprobs = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - log_z
        top = logits.topk(num_top)
        scores = (logprobs, top.indices, top.values - log_z.unsqueeze(1))
        parts.append((device.to_host(scores[0]), device.to_host(scores[1]), device.to_host(scores[2])))
    return PromptScores(parts)
