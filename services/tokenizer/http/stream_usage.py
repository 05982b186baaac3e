"""Usage in the chunks of OpenAI's streams: none, null in all but the last, or the usage so far."""

from __future__ import annotations

from scalellm.services.tokenizer.http.api_request import SamplingRequest
from scalellm.services.tokenizer.http.wire import usage_json


class StreamUsage:
    """Counts the usage of a stream, and writes it in the form that its request asks for.

    Args:
        request: The client's request.

    Attributes:
        plain_tail: End of a chunk that has neither log-probabilities nor token ids nor usage so far.
        prompt_tokens: Prompt tokens of all prompts.
        completion_tokens: Completion tokens that were sent.
    """

    def __init__(self, request: SamplingRequest) -> None:
        self._is_continuous = request.continuous_usage
        self._null = ',"usage":null' if request.includes_usage else ""
        self.plain_tail = f',"logprobs":null,"finish_reason":null}}]{self._null}}}\n\n'
        self.prompt_tokens = self.completion_tokens = 0

    def shown(self) -> str:
        """The field of a chunk, with a comma before it; empty where there is none."""
        if self._is_continuous:
            return f',"usage":{usage_json(self.prompt_tokens, self.completion_tokens)}'
        return self._null
