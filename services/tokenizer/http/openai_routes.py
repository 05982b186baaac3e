"""OpenAI's /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from services.tokenizer.call_bytes import CallAccount
from services.tokenizer.generation.edge import Edge
from services.tokenizer.http.call import HttpCall
from services.tokenizer.http.chat_format import ChatDocument, ChatStream
from services.tokenizer.http.chat_request import ChatRequest
from services.tokenizer.http.completion_format import CompletionDocument, CompletionStream
from services.tokenizer.http.completion_request import CompletionRequest, Prompt, split_prompts
from services.tokenizer.http.face import HttpFace
from services.tokenizer.http.json_body import JsonObject
from services.tokenizer.http.service_routes import check_model
from services.tokenizer.http.sink import serve
from services.tokenizer.limits import INLINE_TOKENS
from services.tokenizer.text.detokenizer import TokenTexts


class OpenAiRoutes:
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
        face.add_body(app, "/v1/chat/completions", self.chat)
        face.add_body(app, "/v1/completions", self.complete)

    async def chat(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Answer a conversation."""
        edge = self._edge
        request = ChatRequest.read(body, is_strict=self._is_strict)
        check_model(request.model, edge)
        requests = request.requests(call.request_id, content_is_text=edge.prompts.can_take_content_as_text)
        answer_id = f"chatcmpl-{requests[0].request_id}"
        make = ChatStream if request.stream else ChatDocument
        format = make(request, answer_id, edge.model_name, edge.prompts.texts)
        return await serve(edge, call, requests, [request.names], format, is_stream=bool(request.stream))

    async def complete(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Continue prompts."""
        edge = self._edge
        request = CompletionRequest.read(body, is_strict=self._is_strict)
        check_model(request.model, edge)
        prompts = split_prompts(request.prompt, edge.limits)
        requests = request.requests(call.request_id, prompts)
        echoes = await self._echoes(call, prompts) if request.echo else [""] * len(prompts)
        answer_id = f"cmpl-{request.request_id or call.request_id}"
        make = CompletionStream if request.stream else CompletionDocument
        format = make(request, answer_id, edge.model_name, edge.prompts.texts, echoes)
        names = [request.names(number) for number in range(len(requests))]
        return await serve(edge, call, requests, names, format, is_stream=bool(request.stream))

    async def _echoes(self, call: HttpCall, prompts: Sequence[Prompt]) -> list[str]:
        """The texts of prompts. Long ones are made when it is the caller's turn."""
        builder = self._edge.prompts
        num_tokens = sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))
        if num_tokens <= INLINE_TOKENS:
            return [_text_of(prompt, builder.texts) for prompt in prompts]
        caller = call.tenant(self._edge.access).name
        return await builder.run(caller, lambda: [_text_of(prompt, builder.texts) for prompt in prompts])


def _text_of(prompt: Prompt, texts: TokenTexts) -> str:
    if isinstance(prompt, str):
        return prompt
    detokenizer = texts.detokenizer(skip_special_tokens=False)
    return detokenizer.push(prompt) + detokenizer.flush()
