"""How far a request has come, over all links on which it was tried: each token and log-probability counts once."""

from __future__ import annotations

from scalellm.v1 import common_pb2, link_pb2
from services.common.link.logprobs import skip_logprobs

_RUNS = common_pb2.FINISH_REASON_UNSPECIFIED


class ProgressError(Exception):
    """What came does not follow what had come: "skipped tokens 3 to 4 of sample 0". The request cannot go on."""


class SampleProgress:
    """What came of one sample.

    Attributes:
        tokens: All its tokens.
        num_logprobs: Tokens whose log-probabilities came.
        ended: Why it ended; FINISH_REASON_UNSPECIFIED while it runs.
    """

    __slots__ = ("ended", "num_logprobs", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_logprobs = 0
        self.ended: common_pb2.FinishReason = _RUNS


class RequestProgress:
    """What came of one request. A request that moves is replayed from it, and what comes twice is dropped by it.

    Args:
        num_samples: Samples of the request.
        num_prompt_tokens: Tokens of its prompt.

    Attributes:
        samples: By index.
        num_prompt_logprobs: Tokens of the prompt whose log-probabilities came.
    """

    __slots__ = ("num_prompt_logprobs", "num_prompt_tokens", "samples")

    def __init__(self, num_samples: int, num_prompt_tokens: int = 0) -> None:
        self.samples = [SampleProgress() for _ in range(num_samples)]
        self.num_prompt_tokens = num_prompt_tokens
        self.num_prompt_logprobs = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def all_ended(self) -> bool:
        """Whether every sample has ended, so that only the Finish is missing."""
        return all(sample.ended for sample in self.samples)

    def add_tokens(self, index: int, offset: int, token_ids: list[int]) -> list[int]:
        """Take tokens of a sample and return those that are new. Raises ProgressError."""
        tokens = self._sample(index).tokens
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
        sample = self._sample(entry.index)
        known, end = sample.num_logprobs, entry.offset + len(entry.values.logprobs)
        if entry.offset > known:
            raise ProgressError(f"skipped log-probabilities {known} to {entry.offset - 1} of sample {entry.index}")
        if end <= known:
            return False
        skip_logprobs(entry, known)
        sample.num_logprobs = end
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
        sample = self._sample(index)
        if sample.ended:
            return False
        sample.ended = reason
        return True

    def resume(self, submit: link_pb2.Submit) -> None:
        """Make `submit` go on from here.

        Tokens whose log-probabilities are missing, where those were asked for, are left out and so computed again; they
        are the same again. Log-probabilities of the prompt that have all come are not asked for again.
        """
        sampling = submit.sampling
        del submit.resumed[:]
        for index, sample in enumerate(self.samples):
            tokens = sample.tokens
            if sampling.HasField("logprobs") and not sample.ended:
                tokens = tokens[: sample.num_logprobs]
            if tokens or sample.ended:
                submit.resumed.add(index=index, token_ids=tokens, finished=sample.ended)
        if self.num_prompt_logprobs >= self.num_prompt_tokens:
            sampling.ClearField("prompt_logprobs")

    def _sample(self, index: int) -> SampleProgress:
        if index >= len(self.samples):
            raise ProgressError(f"sent sample {index}, which was not asked for")
        return self.samples[index]
