"""Progress of a request over all links on which it ran, in which each token and log-probability counts once."""

from __future__ import annotations

from collections.abc import Iterable

from scalellm.services.common.link.logprobs import skip_logprobs
from scalellm.v1 import common_pb2, link_pb2


class ProgressError(Exception):
    """A message does not continue the ones before it: "skipped tokens 3 to 4 of sample 0". The request cannot go on."""


class RequestProgress:
    """The tokens and ends received for one request. They are sent along when the request moves, and repeated ones are
    dropped.

    Args:
        num_samples: Samples of the request.
        num_prompt_tokens: Tokens of its prompt.

    Attributes:
        tokens: All received tokens, by sample. A fast path may append tokens that it has checked itself.
        num_logprobs: Number of tokens with log-probabilities, by sample.
        ended: Finish reason of each sample; FINISH_REASON_UNSPECIFIED while it runs.
        num_prompt_logprobs: Number of prompt tokens whose log-probabilities were received.
    """

    __slots__ = ("ended", "num_logprobs", "num_prompt_logprobs", "num_prompt_tokens", "tokens")

    def __init__(self, num_samples: int, num_prompt_tokens: int = 0) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_samples)]
        self.num_logprobs = [0] * num_samples
        self.ended: list[common_pb2.FinishReason] = [common_pb2.FINISH_REASON_UNSPECIFIED] * num_samples
        self.num_prompt_tokens = num_prompt_tokens
        self.num_prompt_logprobs = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(map(len, self.tokens))

    @property
    def all_ended(self) -> bool:
        """True if every sample has ended, so that only the Finish is missing."""
        return all(self.ended)

    def add_tokens(self, index: int, offset: int, token_ids: list[int]) -> list[int]:
        """Add tokens of a sample from index `offset` on. Returns those that are new. Raises ProgressError if some are
        missing.
        """
        if index >= len(self.tokens):
            raise _unknown(index)
        tokens = self.tokens[index]
        known = len(tokens) - offset
        if known < 0:
            raise ProgressError(f"skipped tokens {len(tokens)} to {offset - 1} of sample {index}")
        new = token_ids[known:] if known else token_ids
        tokens += new
        return new

    def add_logprobs(self, entry: link_pb2.LinkLogprobs) -> bool:
        """Add log-probabilities of a sample, and drop those in `entry` that were received before. Returns whether any
        are new.

        Raises ProgressError.
        """
        index = entry.index
        if index >= len(self.tokens):
            raise _unknown(index)
        known, end = self.num_logprobs[index], entry.offset + len(entry.values.logprobs)
        if entry.offset > known:
            raise ProgressError(f"skipped log-probabilities {known} to {entry.offset - 1} of sample {index}")
        if end <= known:
            return False
        skip_logprobs(entry, known)
        self.num_logprobs[index] = end
        return True

    def add_prompt_logprobs(self, entry: link_pb2.LinkLogprobs) -> bool:
        """Add log-probabilities of the prompt, and drop those in `entry` that were received before. Returns whether any
        are new.

        Raises ProgressError.
        """
        known, end = self.num_prompt_logprobs, entry.offset + len(entry.values.logprobs)
        if entry.offset > known:
            raise ProgressError(f"skipped log-probabilities {known} to {entry.offset - 1} of the prompt")
        if end > self.num_prompt_tokens:
            raise ProgressError(f"sent log-probabilities of {end} tokens of a prompt of {self.num_prompt_tokens}")
        if end <= known:
            return False
        skip_logprobs(entry, known)
        self.num_prompt_logprobs = end
        return True

    def end_sample(self, index: int, reason: common_pb2.FinishReason) -> bool:
        """Record the end of a sample. Returns False if it had ended before. Raises ProgressError."""
        if index >= len(self.tokens):
            raise _unknown(index)
        if self.ended[index]:
            return False
        self.ended[index] = reason
        return True

    def start_at(self, samples: Iterable[link_pb2.ResumedSample]) -> None:
        """Start with the tokens that the upstream side has already."""
        for sample in samples:
            self.tokens[sample.index] += sample.token_ids
            self.num_logprobs[sample.index] = len(sample.token_ids)
            self.ended[sample.index] = sample.finished

    def resume(self, submit: link_pb2.Submit) -> None:
        """Set `resumed` in `submit`, so that it continues from here.

        If log-probabilities were requested, tokens without them are left out and computed again, with the same result.
        Log-probabilities of the prompt are not requested again if all were received.
        """
        sampling = submit.sampling
        needs_logprobs = sampling.HasField("logprobs")
        del submit.resumed[:]
        for index, (tokens, ended) in enumerate(zip(self.tokens, self.ended, strict=True)):
            if needs_logprobs and not ended:
                tokens = tokens[: self.num_logprobs[index]]
            if tokens or ended:
                submit.resumed.add(index=index, token_ids=tokens, finished=ended)
        if self.num_prompt_logprobs >= self.num_prompt_tokens:
            sampling.ClearField("prompt_logprobs")


def _unknown(index: int) -> ProgressError:
    return ProgressError(f"sent sample {index}, which was not asked for")
