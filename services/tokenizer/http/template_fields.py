"""Fields that say how a conversation is written for the model, which several requests have."""

from __future__ import annotations

import json
from typing import Any

from scalellm.v1 import generation_pb2
from services.common.errors import StatusError
from services.tokenizer.http.api_request import ApiRequest, as_text, set_present

_KWARGS = "chat_template_kwargs"


class TemplateFields(ApiRequest):
    """How the template writes a conversation."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def set_template(self, chat: generation_pb2.Chat, effort: str | None = None) -> None:
        """Say it to a conversation. Raises StatusError.

        Args:
            chat: The conversation.
            effort: `reasoning_effort`, which is one of the template's variables.
        """
        set_present(chat, self, ("add_generation_prompt", "continue_final_message"))
        kwargs = dict(self.chat_template_kwargs or {})
        if effort is not None and kwargs.setdefault("reasoning_effort", as_text(effort, "reasoning_effort")) != effort:
            raise StatusError.invalid("reasoning_effort", f"must be the same as in {_KWARGS}")
        set_kwargs(chat, kwargs)


def set_kwargs(chat: generation_pb2.Chat, kwargs: dict[str, Any]) -> None:
    """Give variables to the template of a conversation. Raises StatusError."""
    if not kwargs:
        return
    try:
        text = json.dumps(kwargs, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise StatusError.invalid(_KWARGS, "is nested too deeply") from None
    chat.template_kwargs = as_text(text, _KWARGS)
