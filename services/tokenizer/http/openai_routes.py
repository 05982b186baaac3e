"""OpenAI's /v1/chat/completions and /v1/completions, and the cancellation of kept ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiohttp import hdrs, web

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.call_bytes import CallAccount
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.answer_format import Format
from scalellm.services.tokenizer.http.api_request import SamplingRequest
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.chat_format import ChatDocument, ChatStream
from scalellm.services.tokenizer.http.chat_request import ChatRequest
from scalellm.services.tokenizer.http.completion_format import CompletionDocument, CompletionStream
from scalellm.services.tokenizer.http.completion_request import CompletionRequest, Prompt, split_prompts
from scalellm.services.tokenizer.http.event_ids import HEADER, NumberedFormat, Place
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.http.service_routes import choose_edge, json_answer, name_model
from scalellm.services.tokenizer.http.sink import serve
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.services.tokenizer.limits import INLINE_TOKENS
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.services.tokenizer.validation import validate_id
from scalellm.v1 import generation_pb2


class OpenAiRoutes:
    """Serves the routes that generate.

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
        face.add(app, hdrs.METH_POST, "/v1/requests/{request_id}/cancel", self.cancel, is_long=True)

    async def chat(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Answer a conversation."""
        request = ChatRequest.read(body, is_strict=self._is_strict)
        place = _place(call, request)
        kept_id = (request.request_id or call.request_id) if request.is_kept else ""
        session_id = request.session_id or ""
        edge = await choose_edge(self._edge, call, body, request.model, session_id=session_id, kept_id=kept_id)
        requests = request.requests(
            call.request_id,
            content_is_text=edge.prompts.can_take_content_as_text,
            tells_reasoning=edge.prompts.writing.dialect.tells_reasoning,
        )
        name_model(edge, requests, request.model)
        answer_id = f"chatcmpl-{requests[0].request_id}"
        make = ChatStream if request.stream else ChatDocument
        echo = request.echoed(requests[0].chat)
        format = make(request, answer_id, edge.model_name, edge.prompts.texts, echo)
        return await self._serve(edge, call, request, requests, [request.names], format, place)

    async def cancel(self, call: HttpCall) -> web.StreamResponse:
        """Cancel a kept request, for which OpenAI has no route. One that has ended is not changed."""
        request_id = call.request.match_info["request_id"]
        validate_id(request_id, "request_id")
        await self._edge.kept.cancel(self._edge.models, self._edge.access.tenant(), request_id)
        return json_answer({"id": request_id, "object": "request", "status": "ended"})

    async def complete(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Continue prompts."""
        request = CompletionRequest.read(body, is_strict=self._is_strict)
        place = _place(call, request)
        self._edge.models.choose(request.model)
        prompts = split_prompts(request.prompt, self._edge.limits)
        requests = request.requests(call.request_id, prompts)
        kept_id = requests[0].request_id if request.is_kept else ""
        edge = await choose_edge(self._edge, call, body, request.model, kept_id=kept_id)
        name_model(edge, requests, request.model)
        echoes = await self._echoes(edge, prompts) if request.echo else [""] * len(prompts)
        answer_id = f"cmpl-{request.request_id or call.request_id}"
        make = CompletionStream if request.stream else CompletionDocument
        format = make(request, answer_id, edge.model_name, edge.prompts.texts, echoes)
        names = [request.names(number) for number in range(len(requests))]
        return await self._serve(edge, call, request, requests, names, format, place)

    async def _serve(
        self,
        edge: Edge,
        call: HttpCall,
        request: SamplingRequest,
        requests: Sequence[generation_pb2.GenerateRequest],
        names: Sequence[Mapping[str, str]],
        format: Format,
        place: Place | None,
    ) -> web.StreamResponse:
        num_samples = request.n or 1
        seen = place.seen(len(requests), num_samples) if place is not None else None
        if request.is_kept and request.stream:
            request_id = request.request_id or call.request_id
            format = NumberedFormat(format, request_id, len(requests), num_samples, seen)
        offsets = [[place.num_tokens for place in places] for places in seen] if seen is not None else None
        return await serve(edge, call, requests, names, format, is_stream=bool(request.stream), seen=offsets)

    async def _echoes(self, edge: Edge, prompts: Sequence[Prompt]) -> list[str]:
        """Return the texts of prompts. Long ones are decoded when it is the caller's turn."""
        builder = edge.prompts
        num_tokens = sum(len(prompt) for prompt in prompts if not isinstance(prompt, str))
        if num_tokens <= INLINE_TOKENS:
            return [_text_of(prompt, builder.texts) for prompt in prompts]
        caller = edge.access.tenant().name
        return await builder.run(caller, lambda: [_text_of(prompt, builder.texts) for prompt in prompts])


def _place(call: HttpCall, request: SamplingRequest) -> Place | None:
    """Return the position from which a kept answer is resumed, and set the call's request id; None if it is not
    resumed.
    """
    event_id = call.request.headers.get(HEADER)
    if event_id is None:
        return None
    if not (request.is_kept and request.stream):
        raise StatusError.invalid(HEADER, "needs a body with stream: true and on_disconnect: keep")
    place = Place.read(event_id)
    if request.request_id not in (None, place.request_id):
        raise StatusError.invalid(HEADER, f"is of request {place.request_id!r}, not of {request.request_id[:128]!r}")
    call.request_id = place.request_id
    return place


def _text_of(prompt: Prompt, texts: TokenTexts) -> str:
    if isinstance(prompt, str):
        return prompt
    detokenizer = texts.detokenizer(skip_special_tokens=False)
    return detokenizer.push(prompt) + detokenizer.flush()
