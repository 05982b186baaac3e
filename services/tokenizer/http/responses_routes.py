"""OpenAI's /v1/responses. One that is kept is a session of its own: the conversation up to it, and its document."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import grpc
from aiohttp import hdrs, web

from scalellm.v1 import generation_pb2
from services.common.api_keys import Tenant
from services.common.errors import StatusError
from services.tokenizer.call_bytes import CallAccount
from services.tokenizer.generation.edge import Edge
from services.tokenizer.http.call import HttpCall
from services.tokenizer.http.face import HttpFace
from services.tokenizer.http.json_body import JsonObject
from services.tokenizer.http.responses_format import ResponseDocument, ResponseStream
from services.tokenizer.http.responses_request import ResponsesRequest, Said
from services.tokenizer.http.service_routes import check_model, json_answer
from services.tokenizer.http.sink import serve
from services.tokenizer.session import Session, Turn
from services.tokenizer.session_store import SaveOutcome
from services.tokenizer.validation import is_id

_PATH = "/v1/responses"
_ONE = f"{_PATH}/{{response_id}}"


class ResponsesRoutes:
    """Generates, and keeps what was generated.

    Args:
        edge: The worker.
        is_strict: Refuse fields that are not known.
    """

    def __init__(self, edge: Edge, *, is_strict: bool) -> None:
        self._edge = edge
        self._is_strict = is_strict

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the routes."""
        face.add_body(app, _PATH, self.create)
        face.add(app, hdrs.METH_GET, _ONE, self.get)
        face.add(app, hdrs.METH_DELETE, _ONE, self.delete)
        face.add(app, hdrs.METH_POST, f"{_ONE}/cancel", self.cancel)
        face.add(app, hdrs.METH_GET, f"{_ONE}/input_items", self.input_items)

    async def create(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Answer, behind an earlier response if one is named."""
        edge = self._edge
        request = ResponsesRequest.read(body, is_strict=self._is_strict)
        check_model(request.model, edge)
        tenant = call.tenant(edge.access)
        said = request.said()
        history: Said = ()
        if request.previous_response_id is not None:
            history = (await self._load(tenant, request.previous_response_id, "previous_response_id")).messages
        if request.store:
            await edge.sessions.of(tenant).check_room()
        content_is_text = edge.prompts.can_take_content_as_text
        made = request.to_generate(call.request_id, history, said, content_is_text=content_is_text)
        is_stored = request.store is not False and edge.sessions.is_on
        make = ResponseStream if request.stream else ResponseDocument
        response_id = f"resp_{secrets.token_hex(16)}"
        format = make(request, response_id, edge.model_name, edge.prompts.texts, is_stored=is_stored)

        async def on_finished(finished: Sequence[generation_pb2.Finished]) -> None:
            format.finish(finished)
            if is_stored:
                await self._keep(tenant, format, (*history, *said))

        if isinstance(format, ResponseStream):
            call.error_event = format.failed
        names = request.names(len(made.chat.messages) - len(said))
        is_stream = bool(request.stream)
        return await serve(edge, call, [made], [names], format, is_stream=is_stream, on_finished=on_finished)

    async def get(self, call: HttpCall) -> web.StreamResponse:
        """A response that was kept."""
        session = await self._load(call.tenant(self._edge.access), call.request.match_info["response_id"])
        return web.Response(body=session.document.encode(), content_type="application/json")

    async def delete(self, call: HttpCall) -> web.StreamResponse:
        """Forget a response. Those behind it stay."""
        response_id = call.request.match_info["response_id"]
        tenant = call.tenant(self._edge.access)
        await self._load(tenant, response_id)
        await self._edge.sessions.of(tenant).delete(response_id)
        return json_answer({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, call: HttpCall) -> web.StreamResponse:
        """Refused: only background responses run on without their client, and there are none."""
        await self._load(call.tenant(self._edge.access), call.request.match_info["response_id"])
        raise StatusError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "response_id: has ended; a response that runs is cancelled by closing its connection",
            field="response_id",
        )

    async def input_items(self, call: HttpCall) -> web.StreamResponse:
        """What a response answers, from the beginning of the conversation on."""
        session = await self._load(call.tenant(self._edge.access), call.request.match_info["response_id"])
        items = [_item(f"msg_{index}", role, content) for index, (role, content) in enumerate(session.messages[:-1])]
        if call.request.query.get("order", "desc") != "asc":
            items.reverse()
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
        return json_answer({"object": "list", "data": items, **ends, "has_more": False})

    async def _load(self, tenant: Tenant, response_id: str, field: str = "response_id") -> Session:
        session = None
        if is_id(response_id):
            session = await self._edge.sessions.of(tenant).load(response_id)
        if session is None or not session.document:
            raise StatusError(
                grpc.StatusCode.NOT_FOUND,
                f"{field}: there is no response {response_id[:128]!r}, or it expired",
                field=field,
            )
        return session

    async def _keep(self, tenant: Tenant, format: ResponseDocument, said: Said) -> None:
        """Store a response, if that can be done; the answer says whether it was."""
        now = time.time()
        messages = (*said, ("assistant", format.text))
        turn = Turn(len(messages), 0)
        session = Session(messages, (), (turn,), now, now, document=format.whole())
        outcome = await self._edge.sessions.of(tenant).save(format.response["id"], session)
        format.response["store"] = outcome is SaveOutcome.SAVED


def _item(item_id: str, role: str, content: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    part: dict[str, Any] = {"type": kind, "text": content}
    if role == "assistant":
        part |= {"annotations": [], "logprobs": []}
    return {"id": item_id, "type": "message", "status": "completed", "role": role, "content": [part]}
