"""A request's input as token ids: raw text, chat template, session history or ids as they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.dialect.dialect import ToolsInPrompt
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.services.tokenizer.message import Message, for_template
from scalellm.services.tokenizer.session import Session
from scalellm.services.tokenizer.template_kwargs import read_template_kwargs, with_effort
from scalellm.services.tokenizer.text.chat_renderer import ChatRenderer
from scalellm.services.tokenizer.text.chat_template_error import ChatTemplateError
from scalellm.services.tokenizer.text.content_as_text import MarkedText, SpecialTexts
from scalellm.services.tokenizer.text.conversation import Continuation, ConversationEncoder
from scalellm.services.tokenizer.text.encoder import EncodeBatcher, TooManyTokensError
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer
from scalellm.services.tokenizer.tools import documents_for_template, tools_for_template
from scalellm.services.tokenizer.validation import context_exceeded, too_many_tokens
from scalellm.services.tokenizer.writing import Writing
from scalellm.v1 import generation_pb2

_log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class _Told(NamedTuple):
    """The variables of a chat template that the request sets."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    documents: list[Any] | None
    kwargs: JsonObject


@dataclass(frozen=True, slots=True)
class Prompt:
    """The model's input.

    Attributes:
        token_ids: All of it.
        continuation: The same in segments, for a session.
    """

    token_ids: Sequence[int]
    continuation: Continuation | None = None


class PromptBuilder:
    """Makes the token ids of requests: chat template and encoding. Use as an async context manager.

    Args:
        model: The model's tokenizer.

    Attributes:
        model: See above.
        writing: The model's way of writing.
        texts: Texts of the model's tokens.
    """

    def __init__(self, model: ModelTokenizer) -> None:
        self.model = model
        self.writing = Writing(model)
        self.texts = self.writing.texts
        self._encoder = EncodeBatcher(model.tokenizer)
        self._conversations = ConversationEncoder(model.tokenizer)
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
        """True if chats can be rendered."""
        return self._renderer is not None

    @property
    def can_take_content_as_text(self) -> bool:
        """True if special tokens' texts in contents can be encoded as plain text. Otherwise such chats are refused."""
        return self._encoder.special_texts.are_alone

    @property
    def is_working(self) -> bool:
        """True while texts can be encoded and chats rendered; false once that has failed for good."""
        return self._encoder.is_working and (self._renderer is None or self._renderer.is_working)

    @property
    def num_panics(self) -> int:
        """Number of texts on which the tokenizers library panicked."""
        return self._encoder.num_panics

    async def build(
        self, request: generation_pb2.GenerateRequest, session: Session | None, *, caller: str, max_model_len: int
    ) -> Prompt:
        """Return the prompt of a request that passed validation. Raises StatusError.

        Args:
            request: The request.
            session: The conversation that it continues, if any.
            caller: Name of the tenant whose turn a long text takes.
            max_model_len: The model's context length. A text that certainly exceeds it is refused before it is encoded.
        """
        if request.WhichOneof("input") == "tokens":
            return Prompt(request.tokens.ids)

        async def encode(text: MarkedText) -> list[int]:
            return await self._encode_rendered(text, caller=caller, max_tokens=max_model_len - 1)

        try:
            if request.WhichOneof("input") == "prompt":
                return Prompt(await self._encoder.encode(request.prompt, caller=caller, max_tokens=max_model_len - 1))
            effort = request.reasoning.effort
            if session is None:
                return Prompt(await encode(await self.render(request.chat, caller=caller, effort=effort)))
            rendered = await self.render(request.chat, session.messages, caller=caller, effort=effort)
            continuation = await self._conversations.extend(session.segments, rendered, encode)
        except TooManyTokensError as error:
            raise context_exceeded(request, max_model_len, f"at least {error.at_least}") from None
        return Prompt(continuation.token_ids, continuation)

    async def predicted(self, text: str, *, caller: str, max_tokens: int) -> list[int]:
        """Return the first `max_tokens` token ids of a text that an answer is expected to repeat."""
        return (await self._encoder.encode(text, caller=caller, add_special_tokens=False))[:max_tokens]

    async def render(
        self, chat: generation_pb2.Chat, history: Sequence[Message] = (), *, caller: str, effort: str = ""
    ) -> MarkedText:
        """Render a conversation: `history`, then `chat`, with marks if `chat` asks for content as text. Raises
        StatusError.

        Args:
            chat: The new messages.
            history: The messages before.
            caller: Name of the tenant whose turn a long text takes.
            effort: See ReasoningOptions.effort.
        """
        if self._renderer is None:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"chat: {self._no_renderer}", field="chat")
        tools = tools_for_template(chat)
        messages = for_template([*history, *map(Message.of_wire, chat.messages)], tools, self.writing.dialect)
        told = _Told(
            messages,
            tools if self.writing.dialect.tools is not ToolsInPrompt.WRITTEN_OUT else [],
            documents_for_template(chat),
            with_effort(read_template_kwargs(chat.template_kwargs), effort),
        )
        mark = ""
        if chat.content_is_text:
            special = self._encoder.special_texts
            if not special.are_alone:
                raise StatusError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "chat.content_is_text: this model's tokenizer encodes a text behind a special token differently "
                    "from one that stands alone",
                    field="chat.content_is_text",
                )
            mark, told = await self._encoder.run(caller, partial(self._mark, special, told))
        adds_header = chat.add_generation_prompt or not (
            chat.HasField("add_generation_prompt") or chat.continue_final_message
        )
        try:
            text = await self._renderer.render(
                told.messages,
                caller=caller,
                add_generation_prompt=adds_header,
                continue_final_message=chat.continue_final_message,
                tools=told.tools or None,
                documents=told.documents,
                kwargs=told.kwargs,
            )
        except ChatTemplateError as error:
            raise StatusError.invalid("chat", str(error).replace(mark, "") if mark else str(error)) from None
        return MarkedText(text, mark)

    async def encode(
        self, text: str | MarkedText, field: str, *, caller: str, max_tokens: int, add_special_tokens: bool = False
    ) -> list[int]:
        """Return the token ids of a text, `max_tokens` at most. Raises StatusError that names `field`."""
        try:
            if isinstance(text, MarkedText):
                ids = await self._encode_rendered(text, caller=caller, max_tokens=max_tokens)
            else:
                ids = await self._encoder.encode(
                    text, caller=caller, add_special_tokens=add_special_tokens, max_tokens=max_tokens
                )
        except TooManyTokensError as error:
            raise too_many_tokens(field, max_tokens, f"at least {error.at_least}") from None
        if len(ids) > max_tokens:
            raise too_many_tokens(field, max_tokens, str(len(ids)))
        return ids

    def _mark(self, special: SpecialTexts, told: _Told) -> tuple[str, _Told]:
        texts = json.dumps(told, ensure_ascii=False)
        mark = special.choose_mark([texts, self.model.chat_template or ""])
        return mark, _Told(*(special.mark_all(value, mark) for value in told))

    async def _encode_rendered(self, text: MarkedText, *, caller: str, max_tokens: int) -> list[int]:
        if text.mark:
            return await self._encoder.encode_marked(text, caller=caller, max_tokens=max_tokens)
        return await self._encoder.encode(text.text, caller=caller, add_special_tokens=False, max_tokens=max_tokens)

    async def run(self, caller: str, work: Callable[[], ResultT]) -> ResultT:
        """Run long work on text in the encoder's thread when it is the caller's turn, and return its result."""
        return await self._encoder.run(caller, work)
