"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from aiohttp import web

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.call_bytes import CallAccount
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.api_request import renamed
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.errors import ANTHROPIC_ERRORS
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.http.messages_format import MessageDocument, MessageStream
from scalellm.services.tokenizer.http.messages_request import MessagesRequest
from scalellm.services.tokenizer.http.service_routes import choose_edge, json_answer
from scalellm.services.tokenizer.http.sink import serve
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.services.tokenizer.tokenizing import Tokenizing
from scalellm.v1 import tokenizer_pb2


class AnthropicRoutes:
    """Generates.

    Args:
        edge: The worker.
        is_strict: Refuse fields that are not known.
    """

    def __init__(self, edge: Edge, *, is_strict: bool) -> None:
        self._edge = edge
        self._is_strict = is_strict

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the routes."""
        face.add_body(app, "/v1/messages", self.create, ANTHROPIC_ERRORS)
        face.add_body(app, "/v1/messages/count_tokens", self.count, ANTHROPIC_ERRORS)

    async def create(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Answer a conversation."""
        request = MessagesRequest.read(body, is_strict=self._is_strict)
        edge = await choose_edge(self._edge, call, body, request.model)
        made = request.to_generate(
            call.request_id,
            content_is_text=edge.prompts.can_take_content_as_text,
            tells_reasoning=edge.prompts.writing.dialect.tells_reasoning,
        )
        make = MessageStream if request.stream else MessageDocument
        format = make(f"msg_{call.request_id}", edge.model_name)
        return await serve(edge, call, [made], [request.names], format, is_stream=bool(request.stream))

    async def count(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Count the tokens of a conversation, as the model would read it."""
        edge = self._edge
        tenant = edge.access.tenant()
        async with edge.quotas.admitted(tenant):
            request = MessagesRequest.read(body, is_strict=self._is_strict)
            edge = edge.models.choose(request.model)
            chat = request.chat(content_is_text=edge.prompts.can_take_content_as_text)
            asked = tokenizer_pb2.ApplyChatTemplateRequest(chat=chat)
            try:
                answer = await Tokenizing(edge).apply_chat_template(asked, tenant.name)
            except StatusError as error:
                raise renamed(error, request.names) from None
        return json_answer({"input_tokens": len(answer.token_ids)})
