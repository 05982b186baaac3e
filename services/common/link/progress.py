"""Progress of a request over all links on which it was tried: each token and log-probability counts once."""

from __future__ import annotations

from collections.abc import Iterable

from scalellm.services.common.link.logprobs import skip_logprobs
from scalellm.v1 import common_pb2, link_pb2


class ProgressError(Exception):
    """A message does not continue the ones before it: "skipped tokens 3 to 4 of sample 0". The request cannot go on."""


class RequestProgress:
    """Everything received for one request. A move replays it, and it drops whatever arrives twice.

    Args:
        num_samples: Samples of the request.
        num_prompt_tokens: Tokens of its prompt.

    Attributes:
        tokens: All tokens that came, by sample. Whoever knows that some follow may append them.
        num_logprobs: Number of them that have log-probabilities, by sample.
        ended: Finish reason of each sample; FINISH_REASON_UNSPECIFIED while it runs.
        num_prompt_logprobs: Tokens of the prompt whose log-probabilities came.
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
        """Tokens of all samples."""
        return sum(map(len, self.tokens))

    @property
    def all_ended(self) -> bool:
        """True if every sample has ended, so that only the Finish is missing."""
        return all(self.ended)

    def add_tokens(self, index: int, offset: int, token_ids: list[int]) -> list[int]:
        """Take tokens of a sample and return those that are new. Raises ProgressError."""
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
        """Take log-probabilities of a sample and cut off what had come. Returns whether any are new.

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
        """Take log-probabilities of the prompt and cut off what had come. Returns whether any are new.

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
        """A sample ended. Returns False where that was known. Raises ProgressError."""
        if index >= len(self.tokens):
            raise _unknown(index)
        if self.ended[index]:
            return False
        self.ended[index] = reason
        return True

    def start_at(self, samples: Iterable[link_pb2.ResumedSample]) -> None:
        """Begin with what the upstream side has had already."""
        for sample in samples:
            self.tokens[sample.index] += sample.token_ids
            self.num_logprobs[sample.index] = len(sample.token_ids)
            self.ended[sample.index] = sample.finished

    def resume(self, submit: link_pb2.Submit) -> None:
        """Make `submit` go on from here.

        Tokens whose log-probabilities are missing, where those were asked for, are left out and so computed again; they
        are the same again. Log-probabilities of the prompt that have all come are not asked for again.
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
