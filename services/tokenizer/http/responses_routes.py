"""OpenAI's /v1/responses. A stored response is a session of its own: the conversation up to it, and its document."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence

import grpc
from aiohttp import hdrs, web

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.call_bytes import CallAccount
from scalellm.services.tokenizer.generation.answer_shape import splits
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.generation.request_path import Generation
from scalellm.services.tokenizer.http.api_request import renamed
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.http.kept_responses import KeptResponses, as_session, asked_for, said
from scalellm.services.tokenizer.http.responses_format import ResponseDocument, ResponseStream
from scalellm.services.tokenizer.http.responses_items import input_items
from scalellm.services.tokenizer.http.responses_request import ResponsesRequest
from scalellm.services.tokenizer.http.service_routes import choose_edge, json_answer, name_model
from scalellm.services.tokenizer.http.sink import HttpCaller, OnFinished, serve
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.sampling_defaults import with_defaults
from scalellm.services.tokenizer.session import Session
from scalellm.services.tokenizer.validation import is_id
from scalellm.v1 import generation_pb2

_PATH = "/v1/responses"
_ONE = f"{_PATH}/{{response_id}}"


class ResponsesRoutes:
    """Serves the routes that generate, read and delete responses.

    Args:
        edge: The worker.
        is_strict: Refuse fields that are not known.
    """

    def __init__(self, edge: Edge, *, is_strict: bool) -> None:
        self._edge = edge
        self._is_strict = is_strict
        self._kept = KeptResponses(edge)

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the routes."""
        face.add_body(app, _PATH, self.create)
        face.add(app, hdrs.METH_GET, _ONE, self.get, is_long=True)
        face.add(app, hdrs.METH_DELETE, _ONE, self.delete)
        face.add(app, hdrs.METH_POST, f"{_ONE}/cancel", self.cancel, is_long=True)
        face.add(app, hdrs.METH_GET, f"{_ONE}/input_items", self.input_items)

    async def create(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Generate a response, which continues an earlier one if that is named."""
        request = ResponsesRequest.read(body, is_strict=self._is_strict)
        self._edge.models.choose(request.model)
        request.check(can_keep=self._edge.sessions.is_on)
        tenant = self._edge.access.tenant()
        said = request.said()
        history, earlier = await self._history(tenant, request.previous_response_id)
        edge = await choose_edge(self._edge, call, body, request.model, earlier=earlier)
        if request.store:
            await edge.sessions.of(tenant).check_room()
        content_is_text = edge.prompts.can_take_content_as_text
        response_id, created_at = f"resp_{secrets.token_hex(16)}", int(time.time())
        request_id = response_id if request.is_kept else call.request_id
        made = request.to_generate(
            request_id,
            history,
            said,
            content_is_text=content_is_text,
            tells_reasoning=edge.prompts.writing.dialect.tells_reasoning,
        )
        name_model(edge, [made], request.model)
        asked = asked_for(request, created_at) if request.is_kept else b""
        make = ResponseStream if request.stream else ResponseDocument
        is_stored = request.store is not False and edge.sessions.is_on
        sampling = with_defaults(made.sampling, edge.sampling_defaults)
        texts = edge.prompts.texts
        format = make(
            request,
            response_id,
            created_at,
            edge.model_name,
            texts,
            sampling,
            is_stored=is_stored,
            has_items=splits(made),
        )
        names = request.names(len(made.chat.messages) - len(said))
        if request.background and not request.stream:
            return await self._begin(edge, call, made, asked, format, names)
        if isinstance(format, ResponseStream):
            call.error_event = format.failed
        on_finished = self._storing(tenant, format, (*history, *said))
        is_stream = bool(request.stream)
        return await serve(
            edge, call, [made], [names], format, is_stream=is_stream, on_finished=on_finished, asked=asked
        )

    async def _begin(
        self,
        edge: Edge,
        call: HttpCall,
        made: generation_pb2.GenerateRequest,
        asked: bytes,
        format: ResponseDocument,
        names: Mapping[str, str],
    ) -> web.StreamResponse:
        """Start a background response and return its first state. Raises StatusError."""
        deadline = call.deadline(is_stream=True)
        generation = Generation(edge, made, HttpCaller(call, deadline), asked)
        try:
            async with deadline, generation:
                started = await anext(generation.events)
                assert isinstance(started, generation_pb2.Started)
                format.start(0, started)
        except StatusError as error:
            raise renamed(error, names) from None
        return _document(format.whole())

    async def get(self, call: HttpCall) -> web.StreamResponse:
        """Return the current state of a response, or with `stream=true` its events after `starting_after`."""
        tenant, response_id = self._edge.access.tenant(), call.request.match_info["response_id"]
        if call.request.query.get("stream", "").lower() in ("true", "1"):
            return await self._stream(call, tenant, response_id)
        async with self._edge.quotas.reading(tenant):
            session, _ = await self._load(tenant, response_id)
        return _document(session.document)

    async def _stream(self, call: HttpCall, tenant: Tenant, response_id: str) -> web.StreamResponse:
        starting_after = _starting_after(call)
        kept = await self._kept.find(tenant, response_id) if is_id(response_id) else None
        if kept is None:
            await self._load(tenant, response_id)
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "stream: must be absent here: only a response with background or on_disconnect: keep can be streamed "
                "later, until --kept-ttl-s after its end",
                field="stream",
            )
        format = self._kept.format(ResponseStream, kept)
        format.starting_after = starting_after
        call.error_event = format.failed
        return await serve(
            kept.edge,
            call,
            [kept.head.request],
            [{}],
            format,
            is_stream=True,
            on_finished=self._storing(tenant, format, said(kept, format.request)),
            seen=[[format.tokens_before(starting_after)]],
        )

    async def delete(self, call: HttpCall) -> web.StreamResponse:
        """Delete a response, after cancelling it if it runs. Responses that continue it are kept."""
        response_id = call.request.match_info["response_id"]
        tenant = self._edge.access.tenant()
        kept = await self._kept.find(tenant, response_id) if is_id(response_id) else None
        if kept is None:
            await self._load(tenant, response_id)
        else:
            await self._edge.kept.forget(self._edge.models, tenant, response_id)
        await self._edge.sessions.of(tenant).delete(response_id)
        return json_answer({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, call: HttpCall) -> web.StreamResponse:
        """Cancel a kept response. One that has ended is not changed."""
        tenant, response_id = self._edge.access.tenant(), call.request.match_info["response_id"]
        kept = await self._kept.find(tenant, response_id) if is_id(response_id) else None
        if kept is not None:
            await kept.cancel()
        session, _ = await self._load(tenant, response_id)
        if kept is None and not json.loads(session.document)["background"]:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "response_id: has ended; one that began without background or on_disconnect: keep is cancelled by "
                "closing its connection",
                field="response_id",
            )
        return _document(session.document)

    async def input_items(self, call: HttpCall) -> web.StreamResponse:
        """Return the items that a response answers, from the beginning of the conversation on."""
        session, _ = await self._load(self._edge.access.tenant(), call.request.match_info["response_id"])
        items = [
            item for index, message in enumerate(session.messages[:-1]) for item in input_items(message, f"msg_{index}")
        ]
        if call.request.query.get("order", "desc") != "asc":
            items.reverse()
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
        return json_answer({"object": "list", "data": items, **ends, "has_more": False})

    async def _history(self, tenant: Tenant, response_id: str | None) -> tuple[Sequence[Message], str]:
        """Return the conversation up to a response, its answer included, and its model. Raises StatusError."""
        if response_id is None:
            return (), ""
        field = "previous_response_id"
        session, status = await self._load(tenant, response_id, field)
        if status not in ("completed", "incomplete"):
            message = f"{field}: response {response_id!r} is {status}; only what is complete can be gone on from"
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, message, field=field)
        return session.messages, session.model

    async def _load(self, tenant: Tenant, response_id: str, field: str = "response_id") -> tuple[Session, str]:
        """Return a response as a session, and its status. Raises StatusError NOT_FOUND, UNAVAILABLE."""
        if is_id(response_id):
            session = await self._edge.sessions.of(tenant).load(response_id)
            if session is not None and session.document:
                return session, "completed"
            kept = await self._kept.find(tenant, response_id)
            if kept is not None:
                format = await self._kept.read(tenant, kept)
                return as_session(format, said(kept, format.request)), format.response["status"]
        raise StatusError(
            grpc.StatusCode.NOT_FOUND,
            f"{field}: there is no response {response_id[:128]!r}, or it expired",
            field=field,
        )

    def _storing(self, tenant: Tenant, format: ResponseDocument, messages: Sequence[Message]) -> OnFinished:
        async def on_finished(finished: Sequence[generation_pb2.Finished]) -> None:
            format.finish(finished)
            await self._kept.store(tenant, format, messages)

        return on_finished


def _document(text: str) -> web.Response:
    return web.Response(body=text.encode(), content_type="application/json")


def _starting_after(call: HttpCall) -> int:
    text = call.request.query.get("starting_after", "")
    if not text:
        return -1
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise StatusError.invalid("starting_after", "must be the sequence_number of an event")
    return int(text)
