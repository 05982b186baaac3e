"""Requests of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text
from scalellm.services.tokenizer.http.api_request import SamplingRequest, UInt32
from scalellm.services.tokenizer.http.shaped_request import ShapedRequest
from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.v1 import generation_pb2

_DEFAULT_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions."""


Prompt = str | list[int]
"""A prompt: text, or token ids."""


class CompletionRequest(ShapedRequest):
    """Completions of one or several prompts."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: UInt32 | None = None
    best_of: UInt32 | None = None

    refused = MappingProxyType(
        {
            **ShapedRequest.refused,
            "suffix": ("",),
            "use_beam_search": (False,),
            "length_penalty": (1, 1.0),
            "bad_words": ([],),
            "allowed_token_ids": ([],),
            "truncate_prompt_tokens": (),
            "logits_processors": ([],),
            "prompt_embeds": (),
            "add_special_tokens": (True,),
        }
    )
    ignored = SamplingRequest.ignored | {"detokenize", "spaces_between_special_tokens"}

    def requests(self, request_id: str, prompts: Sequence[Prompt]) -> list[generation_pb2.GenerateRequest]:
        """Return one request per prompt. Raises StatusError.

        Args:
            request_id: Their id, unless it is named in the request; those of several prompts are numbered.
            prompts: The prompts, from `split_prompts`.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise StatusError.invalid("best_of", f"must be the same as n, got {self.best_of}")
        shared = self.to_generate(request_id)
        if self.max_tokens is None:
            shared.sampling.max_tokens = _DEFAULT_TOKENS
        if self.is_prompt_alone:
            shared.sampling.max_tokens = 1  # the engine generates at least one token, which is not shown
            shared.sampling.ClearField("min_tokens")
        if self.logprobs is not None:
            shared.sampling.logprobs = self.logprobs
            if self.echo:
                shared.sampling.prompt_logprobs = max(self.logprobs, self.prompt_logprobs or 0)
        if self.logprobs is not None or self.return_token_ids:
            shared.output = generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS
        requests = []
        for number, prompt in enumerate(prompts):
            request = generation_pb2.GenerateRequest()
            request.CopyFrom(shared)
            if len(prompts) > 1:
                request.request_id = f"{shared.request_id}-{number}"
            if isinstance(prompt, str):
                request.prompt = prompt
            else:
                request.tokens.ids.extend(prompt)
            requests.append(request)
        return requests

    @property
    def is_prompt_alone(self) -> bool:
        """True if only the prompt with its log-probabilities is wanted, without a completion."""
        return self.max_tokens == 0 and bool(self.echo)

    def names(self, number: int) -> dict[str, str]:
        """Return the client's names of our fields, for one of the prompts."""
        prompt = _param(number, len(self.prompt)) if is_several(self.prompt) else "prompt"
        return {"prompt": prompt, "tokens": prompt, "tokens.ids": prompt, "input": "prompt"} | {
            "sampling.logprobs": "logprobs",
            "sampling.prompt_logprobs": "logprobs" if self.echo else "prompt_logprobs",
            **self.shape.names,
        }


def is_several(prompt: object) -> bool:
    """True if a prompt is a list of prompts."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def split_prompts(prompt: object, limits: RequestLimits) -> list[Prompt]:
    """Return the prompts of a text, token ids, or a list of either. Raises StatusError."""
    if isinstance(prompt, str):
        return [as_text(prompt, "prompt")]
    if not isinstance(prompt, list) or not prompt:
        raise StatusError.invalid("prompt", "must be a string, a list of token ids, or a list of these")
    if not is_several(prompt):
        return [_token_ids(prompt, "prompt")]
    if len(prompt) > limits.max_prompts:
        raise StatusError.invalid("prompt", f"must hold at most {limits.max_prompts} prompts, got {len(prompt)}")
    return [
        as_text(item, f"prompt[{index}]") if isinstance(item, str) else _token_ids(item, f"prompt[{index}]")
        for index, item in enumerate(prompt)
    ]


def _token_ids(value: object, param: str) -> list[int]:
    if not isinstance(value, list):
        raise StatusError.invalid(param, "must be a string or a list of token ids")
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) >= 2**32):
        is_id = (type(item) is int and 0 <= item < 2**32 for item in value)
        raise StatusError.invalid(f"{param}[{list(is_id).index(False)}]", "must be a token id")
    return value


def _param(number: int, count: int) -> str:
    return f"prompt[{number}]" if count > 1 else "prompt"
