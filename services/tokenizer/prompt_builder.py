"""A request's input as token ids: raw text, chat template, session history or ids as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Self

import grpc

from scalellm.v1 import generation_pb2
from services.common.errors import StatusError
from services.tokenizer.session import Session
from services.tokenizer.text.chat_renderer import ChatRenderer
from services.tokenizer.text.chat_template import ChatTemplateError
from services.tokenizer.text.conversation import Continuation, ConversationEncoder
from services.tokenizer.text.detokenizer import TokenTexts
from services.tokenizer.text.encoder import EncodeBatcher
from services.tokenizer.text.model_tokenizer import ModelTokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads.

    Attributes:
        token_ids: All of it.
        continuation: The same in segments, for a session.
    """

    token_ids: Sequence[int]
    continuation: Continuation | None = None


class PromptBuilder:
    """Everything a worker does with text before generation. Use as an async context manager.

    Args:
        model: The model's tokenizer.
    """

    def __init__(self, model: ModelTokenizer) -> None:
        self.model = model
        self.texts = TokenTexts(model.tokenizer)
        self._encoder = EncodeBatcher(model.tokenizer)
        self._conversations = ConversationEncoder(
            model.tokenizer, lambda text: self._encoder.encode(text, add_special_tokens=False)
        )
        self._renderer: ChatRenderer | None = None
        self._no_renderer = "the model has no chat template; use prompt or tokens"
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._encoder)
        if self.model.chat_template is not None:
            try:
                self._renderer = await self._stack.enter_async_context(
                    ChatRenderer(self.model.chat_template, self.model.special_tokens)
                )
            except ChatTemplateError as error:
                _log.warning("chats are refused: %s", error)
                self._no_renderer = f"{error}; use prompt or tokens"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be rendered."""
        return self._renderer is not None

    async def build(self, request: generation_pb2.GenerateRequest, session: Session | None) -> Prompt:
        """Return the prompt of a request that passed validation. Raises StatusError."""
        match request.WhichOneof("input"):
            case "prompt":
                return Prompt(await self._encoder.encode(request.prompt))
            case "tokens":
                return Prompt(request.tokens.ids)
        if session is None:
            return Prompt(await self.encode_rendered(await self.render(request.chat)))
        rendered = await self.render(request.chat, session.messages)
        continuation = await self._conversations.extend(session.segments, rendered)
        return Prompt(continuation.token_ids, continuation)

    async def render(self, chat: generation_pb2.Chat, history: Sequence[tuple[str, str]] = ()) -> str:
        """Return the text of a conversation: `history`, then `chat`. Raises StatusError."""
        if self._renderer is None:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"chat: {self._no_renderer}", field="chat")
        messages = [{"role": role, "content": content} for role, content in history]
        messages += [{"role": message.role, "content": message.content} for message in chat.messages]
        adds_header = not chat.HasField("add_generation_prompt") or chat.add_generation_prompt
        try:
            return await self._renderer.render(messages, add_generation_prompt=adds_header)
        except ChatTemplateError as error:
            raise StatusError.invalid("chat", str(error)) from None

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        return await self._encoder.encode(text, add_special_tokens=add_special_tokens)

    async def encode_rendered(self, text: str) -> list[int]:
        """Return the token ids of a rendered conversation, which brings its own special tokens."""
        return await self._encoder.encode(text, add_special_tokens=False)
