"""Kept responses, which outlive their calls: their current state, and their storage for later reads and turns."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import TypeVar

import grpc

from scalellm.services.common.api_keys import Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.generation.answer_shape import splits
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.responses_format import ResponseDocument
from scalellm.services.tokenizer.http.responses_request import ResponsesRequest
from scalellm.services.tokenizer.kept.following import follow
from scalellm.services.tokenizer.kept.kept_request import KeptRequest
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.services.tokenizer.session import Session, Turn
from scalellm.services.tokenizer.session_store import SaveOutcome
from scalellm.v1 import generation_pb2

_Format = TypeVar("_Format", bound=ResponseDocument)

_NONE = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
"""Statuses for an id under which no request is kept, and for a service without Redis, which keeps none."""


class KeptResponses:
    """Finds kept responses and writes them in the format of the Responses API.

    Args:
        edge: The worker.
    """

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def find(self, tenant: Tenant, response_id: str) -> KeptRequest | None:
        """Return a running or recent response; None if there is none. Raises StatusError UNAVAILABLE."""
        try:
            kept = await self._edge.kept.find(self._edge.models, tenant, response_id)
        except StatusError as error:
            if error.code in _NONE:
                return None
            raise
        return kept if kept.head.asked else None  # another API's request

    def format(self, make: type[_Format], kept: KeptRequest) -> _Format:
        """Make the format of a response, equal to the one that was made when it began."""
        asked = json.loads(kept.head.asked)
        request = ResponsesRequest.model_validate(asked["request"])
        edge = kept.edge
        return make(
            request,
            kept.head.request_id,
            asked["created_at"],
            edge.model_name,
            edge.prompts.texts,
            kept.head.submit.sampling,
            is_stored=request.store is not False,
            has_items=splits(kept.head.request),
        )

    async def read(self, tenant: Tenant, kept: KeptRequest) -> ResponseDocument:
        """Return the current state of a response, and store it if it is complete. Raises StatusError UNAVAILABLE."""
        format = self.format(ResponseDocument, kept)
        await kept.look()
        if not kept.transcript.is_over:
            return format
        trace = LatencyTrace()
        trace.first_token_at = trace.arrived_at  # its own first token was counted by another call
        try:
            async for event in follow(kept, (), 1, trace):
                if type(event) is Delta:
                    format.delta(0, event)
                elif isinstance(event, generation_pb2.Finished):
                    format.finish([event])
                await asyncio.sleep(0)  # a long answer takes a while
        except StatusError as error:
            if error.code is grpc.StatusCode.UNAVAILABLE:
                raise
            format.fail(error)
        else:
            await self.store(tenant, format, said(kept, format.request))
        return format

    async def store(self, tenant: Tenant, format: ResponseDocument, messages: Sequence[Message]) -> None:
        """Store a response with the conversation before it, unless its client does not want that.

        The response states whether it was stored. Storing it again changes nothing.
        """
        if format.request.store is False or not self._edge.sessions.is_on:
            return
        session = as_session(format, messages)
        response_id = format.response["id"]
        outcome = await self._edge.sessions.of(tenant).save(response_id, session, version=response_id)
        format.response["store"] = outcome is SaveOutcome.SAVED


def as_session(format: ResponseDocument, messages: Sequence[Message]) -> Session:
    """Return a response as a session of one turn: the conversation up to it, and its document."""
    now = time.time()
    turn = Turn(len(messages) + 1, 0)
    answered = (*messages, format.answer)
    return Session(answered, (), (turn,), now, now, document=format.whole(), model=format.response["model"])


def asked_for(request: ResponsesRequest, created_at: int) -> bytes:
    """Return the data that is needed in addition to the messages to write a response; see Head.asked."""
    fields = request.model_dump(exclude={"input"}, exclude_unset=True)
    return json.dumps({"created_at": created_at, "request": fields}).encode()


def said(kept: KeptRequest, request: ResponsesRequest) -> Sequence[Message]:
    """Return the conversation that a response answers, without the instructions."""
    messages = list(map(Message.of_wire, kept.head.request.chat.messages))
    return messages[1 if request.instructions else 0 :]
