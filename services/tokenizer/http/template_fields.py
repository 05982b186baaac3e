"""The fields, common to several requests, that control how a conversation is written for the model."""

from __future__ import annotations

import json
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text
from scalellm.services.tokenizer.http.api_request import ApiRequest, set_present
from scalellm.v1 import generation_pb2

_KWARGS = "chat_template_kwargs"


class TemplateFields(ApiRequest):
    """The fields for the chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def set_template(self, chat: generation_pb2.Chat) -> None:
        """Copy the fields to a conversation. Raises StatusError."""
        set_present(chat, self, ("add_generation_prompt", "continue_final_message"))
        if not self.chat_template_kwargs:
            return
        try:
            text = json.dumps(self.chat_template_kwargs, ensure_ascii=False, separators=(",", ":"))
        except RecursionError:
            raise StatusError.invalid(_KWARGS, "is nested too deeply") from None
        chat.template_kwargs = as_text(text, _KWARGS)
