"""The format of an answer: what one API writes for each event of a generation."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.v1 import generation_pb2


class Format:
    """Writes one answer in the format of one API. Prompts have numbers from 0 in the order of the request."""

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Return the text for an accepted generation; by default none."""
        return ""

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Return the text for log-probabilities of a part of a prompt; by default none."""
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """Return the text for new tokens."""
        raise NotImplementedError

    def sample_end(self, prompt: int, sample: generation_pb2.SampleFinished) -> str:
        """Return the text for the end of a sample; by default none. Called once for each sample, before `end`."""
        return ""

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the last text, once all generations have finished; finished: their last events, in order."""
        raise NotImplementedError
