"""Requests of /v1/chat/completions."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text, json_text
from scalellm.services.tokenizer.http.api_request import SamplingRequest, UInt32
from scalellm.services.tokenizer.http.messages import add_messages, text_of
from scalellm.services.tokenizer.http.shaped_request import ShapedRequest
from scalellm.services.tokenizer.http.template_fields import TemplateFields
from scalellm.services.tokenizer.http.tool_fields import set_tools, tool_names
from scalellm.v1 import generation_pb2


class ChatRequest(ShapedRequest, TemplateFields):
    """A chat completion."""

    messages: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    documents: Any = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: UInt32 | None = None
    max_completion_tokens: UInt32 | None = None
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    session_id: str | None = None
    echo: bool | None = None
    prediction: Any = None

    refused = MappingProxyType(
        {
            **ShapedRequest.refused,
            "functions": ([],),
            "function_call": ("none", "auto"),
            "modalities": (["text"], []),
            "audio": (),
            "web_search_options": (),
            "chat_template": (),
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
        "detokenize",
        "spaces_between_special_tokens",
        "top_a",
    }

    def requests(
        self, request_id: str, *, content_is_text: bool, tells_reasoning: bool = False
    ) -> list[generation_pb2.GenerateRequest]:
        """Return the one request. Raises StatusError.

        Args:
            request_id: Its id, unless it names one itself.
            content_is_text: True if the texts of special tokens in messages are plain text.
            tells_reasoning: True to separate the model's reasoning from text.
        """
        request = self.to_generate(request_id)
        add_messages(request.chat, self.messages)
        request.chat.content_is_text = content_is_text
        self.set_template(request.chat)
        set_tools(request.chat, self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls)
        if self.documents:
            request.chat.documents = json_text(self.documents, "documents")
        self._set_reasoning(request, tells_reasoning=tells_reasoning)
        if self.prediction is not None:
            request.prediction = _predicted(self.prediction)
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

    def _set_reasoning(self, request: generation_pb2.GenerateRequest, *, tells_reasoning: bool) -> None:
        if tells_reasoning:
            request.reasoning.SetInParent()
        if (effort := self.reasoning_effort) is not None:
            request.reasoning.effort = as_text(effort, "reasoning_effort")
            if (self.chat_template_kwargs or {}).get("reasoning_effort", effort) != effort:
                raise StatusError.invalid("reasoning_effort", "must be the same as in chat_template_kwargs")
        if self.include_reasoning is not None:
            request.reasoning.include = self.include_reasoning
        if self.thinking_token_budget is not None:
            request.reasoning.budget_tokens = self.thinking_token_budget

    def echoed(self, chat: generation_pb2.Chat) -> str:
        """Return the text with which the answer begins: the last message, if an echo is wanted and the answer either
        continues that message or has the same role.
        """
        if not self.echo or not chat.messages:
            return ""
        begins_one = not self.continue_final_message and self.add_generation_prompt is not False
        last = chat.messages[-1]
        return last.content if not begins_one or last.role == "assistant" else ""

    @property
    def names(self) -> dict[str, str]:
        """The client's names of our fields, where they differ from the rule of `param_of`."""
        most = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        names = {
            "sampling.max_tokens": most,
            "sampling.logprobs": "top_logprobs",
            "reasoning.effort": "reasoning_effort",
            "reasoning.budget_tokens": "thinking_token_budget",
            **tool_names(self.tools, ".function"),
            **self.shape.names,
        }
        for number, message in enumerate(self.messages if isinstance(self.messages, list) else ()):
            calls = message.get("tool_calls") if isinstance(message, dict) else None
            for index in range(len(calls) if isinstance(calls, list) else 0):
                field = f"messages[{number}].tool_calls[{index}]"
                names |= {f"chat.{field}.{name}": f"{field}.function.{name}" for name in ("name", "arguments")}
        return names


def _predicted(prediction: object) -> str:
    """Return the text of OpenAI's `prediction`, parts of which the answer is expected to repeat."""
    if not isinstance(prediction, dict):
        raise StatusError.invalid("prediction", "must be an object")
    if prediction.get("type") != "content":
        raise StatusError.invalid("prediction.type", "must be content")
    return text_of(prediction.get("content"), "prediction.content")
