"""Requests of /v1/chat/completions."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from scalellm.v1 import generation_pb2
from services.common.errors import StatusError
from services.tokenizer.http.api_request import SamplingRequest, UInt32, as_text
from services.tokenizer.http.messages import add_messages
from services.tokenizer.http.shaped_request import ShapedRequest
from services.tokenizer.http.template_fields import TemplateFields


class ChatRequest(ShapedRequest, TemplateFields):
    """A chat completion."""

    messages: Any = None
    reasoning_effort: str | None = None
    max_completion_tokens: UInt32 | None = None
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    session_id: str | None = None
    echo: bool | None = None

    refused = MappingProxyType(
        {
            **ShapedRequest.refused,
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "functions": ([],),
            "function_call": ("none", "auto"),
            "modalities": (["text"], []),
            "audio": (),
            "web_search_options": (),
            "chat_template": (),
            "documents": ([],),
            "use_beam_search": (False,),
            "length_penalty": (1, 1.0),
            "bad_words": ([],),
            "allowed_token_ids": ([],),
            "truncate_prompt_tokens": (),
            "logits_processors": ([],),
            "prompt_embeds": (),
        }
    )
    ignored = SamplingRequest.ignored | {
        "parallel_tool_calls",
        "prediction",
        "detokenize",
        "spaces_between_special_tokens",
        "top_a",
    }

    def requests(self, request_id: str, *, content_is_text: bool) -> list[generation_pb2.GenerateRequest]:
        """Return the one request. Raises StatusError.

        Args:
            request_id: Its id, unless it names one itself.
            content_is_text: Take special tokens' texts in messages for text.
        """
        request = self.to_generate(request_id)
        add_messages(request.chat, self.messages)
        request.chat.content_is_text = content_is_text
        self.set_template(request.chat, self.reasoning_effort)
        if self.max_completion_tokens is not None:
            request.sampling.max_tokens = self.max_completion_tokens
        if self.session_id is not None:
            request.session_id = as_text(self.session_id, "session_id")
        if self.logprobs:
            request.sampling.logprobs = self.top_logprobs or 0
        elif self.top_logprobs:
            raise StatusError.invalid("top_logprobs", "needs logprobs to be true")
        if self.logprobs or self.return_token_ids:
            request.output = generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS
        return [request]

    def echoed(self, chat: generation_pb2.Chat) -> str:
        """Return what the answer begins with: the last message, where that is wanted and its speaker also answers."""
        if not self.echo or not chat.messages:
            return ""
        begins_one = not self.continue_final_message and self.add_generation_prompt is not False
        last = chat.messages[-1]
        return last.content if not begins_one or last.role == "assistant" else ""

    @property
    def names(self) -> dict[str, str]:
        """What our fields are called here, where that differs from the rule."""
        most = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        kwargs = "reasoning_effort" if self.chat_template_kwargs is None else "chat_template_kwargs"
        return {
            "sampling.max_tokens": most,
            "sampling.logprobs": "top_logprobs",
            "chat.template_kwargs": kwargs,
            **self.shape.names,
        }
