"""The format of an answer: what one API writes for each event of a generation."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.v1 import generation_pb2


class Format:
    """Writes one answer in the format of one API. Prompts have numbers from 0 in the order of the request."""

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """A generation was accepted. Returns the events that tell it; here and by default none."""
        return ""

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Log-probabilities of a part of a prompt."""
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """New tokens."""
        raise NotImplementedError

    def sample_end(self, prompt: int, sample: generation_pb2.SampleFinished) -> str:
        """A sample has ended: told once of each, before `end`."""
        return ""

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """All generations have finished: what each said, in order."""
        raise NotImplementedError
