"""The received part of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.v1.generation_pb2 import Finished, GenerateResponse, PromptLogprobs, Started


class Received:
    """The received part of an answer: enough to go on with it by `resume`.

    Attributes:
        started: The first message; None before it came.
        finished: The last message, with finish reasons, usage and latency; None before it came.
        offsets: Tokens received of each sample, by index, those before a resume included.
        num_prompt: Tokens of the prompt whose log-probabilities were received.
    """

    def __init__(self, offsets: Sequence[int] = ()) -> None:
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.offsets = list(offsets)
        self.num_prompt = 0

    def take(self, response: GenerateResponse) -> bool:
        """Note one message of the answer. False if it has no news: a call that goes on says again what it is about."""
        match response.WhichOneof("event"):
            case "started":
                is_first, self.started = self.started is None, response.started
                return is_first
            case "prompt_logprobs":
                part = response.prompt_logprobs
                num_known = self.num_prompt - part.offset
                self.num_prompt = max(self.num_prompt, part.offset + len(part.token_ids))
                _leave_out(part, num_known)
                return bool(part.token_ids)
            case "delta":
                delta = response.delta
                self.offsets += [0] * (delta.index + 1 - len(self.offsets))
                self.offsets[delta.index] = delta.offset + delta.num_tokens
            case "finished":
                is_first, self.finished = self.finished is None, response.finished
                return is_first
        return True


def _leave_out(part: PromptLogprobs, count: int) -> None:
    if count > 0:
        num_top = part.logprobs.num_top
        del part.token_ids[:count], part.logprobs.logprobs[:count]
        del part.logprobs.top_token_ids[: count * num_top], part.logprobs.top_logprobs[: count * num_top]
        part.offset += count
