"""`scalellm.v1.Generation`: requests that come by gRPC."""

from __future__ import annotations

from functools import partial

import grpc
from google.protobuf.json_format import MessageToDict

from scalellm.services.tokenizer.aliases import identity_of
from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.generation.answer import Event
from scalellm.services.tokenizer.generation.caller import Caller
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.generation.request_path import Call, Generation, Resumption
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.services.tokenizer.validation import validate_id
from scalellm.v1 import generation_pb2

_SERVICE = "scalellm.v1.Generation"


class GrpcCaller(Caller):
    """A gRPC call. gRPC itself cancels its task when the client leaves or the deadline passes.

    Args:
        context: Context of the call.
        method: Its full name.
    """

    transport = "grpc"

    def __init__(self, context: grpc.aio.ServicerContext, method: str) -> None:
        self._context = context
        self.method = method
        self.span_attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        self.metadata = context.invocation_metadata() or ()

    def time_remaining(self) -> float | None:
        """Seconds until the deadline of the call."""
        seconds: float | None = self._context.time_remaining()
        return seconds


class GenerationServicer:
    """Serves Generate, Resume and Cancel. Raises StatusError for every outcome but OK.

    Args:
        edge: The worker, and its default model.
    """

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def Generate(self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """Stream an answer."""
        keeps = request.on_disconnect == generation_pb2.ON_DISCONNECT_KEEP
        edge = await self._edge.models.of_request(
            request.model or None,
            self._edge.access.tenant(),
            partial(_identity, request),
            session_id=request.session_id,
            kept_id=request.request_id if keeps else "",
        )
        await _serve(Generation(edge, request, GrpcCaller(context, f"{_SERVICE}/Generate")), context)

    async def Resume(self, request: generation_pb2.ResumeRequest, context: grpc.aio.ServicerContext) -> None:
        """Stream the rest of an answer."""
        await _serve(Resumption(self._edge, request, GrpcCaller(context, f"{_SERVICE}/Resume")), context)

    async def Cancel(
        self, request: generation_pb2.CancelRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.CancelResponse:
        """End a kept request. Quotas do not count this call, because it frees resources."""
        validate_id(request.request_id, "request_id")
        tenant = self._edge.access.tenant()
        await self._edge.kept.cancel(self._edge.models, tenant, request.request_id)
        return generation_pb2.CancelResponse()


async def _serve(call: Call, context: grpc.aio.ServicerContext) -> None:
    try:
        async with call:
            async for event in call.events:
                await context.write(to_wire(event))
    finally:
        context.set_trailing_metadata((("server-timing", call.server_timing),))


def _identity(request: generation_pb2.GenerateRequest) -> bytes:
    seed = request.sampling.seed if request.sampling.HasField("seed") else None
    return identity_of(request.request_id, seed, partial(_prompt, request))


def _prompt(request: generation_pb2.GenerateRequest) -> object:
    """Return the prompt as the JSON value that HTTP clients would send."""
    match request.WhichOneof("input"):
        case "chat":
            return [MessageToDict(each, preserving_proto_field_name=True) for each in request.chat.messages]
        case "tokens":
            return list(request.tokens.ids)
        case _:
            return request.prompt


def to_wire(event: Event) -> generation_pb2.GenerateResponse:
    """Convert an event to its message."""
    response = generation_pb2.GenerateResponse()
    if type(event) is Delta:  # almost always
        delta = response.delta
        if event.index:
            delta.index = event.index
        delta.text = event.text
        delta.offset = event.offset
        delta.num_tokens = event.num_tokens
        if event.token_ids:
            delta.token_ids.extend(event.token_ids)
        if event.parts:
            delta.parts.extend(map(_part_to_wire, event.parts))
        if event.logprobs is not None:
            delta.logprobs.CopyFrom(event.logprobs)
        if event.finished is not None:
            delta.finished.CopyFrom(event.finished)
    elif isinstance(event, generation_pb2.Started):
        response.started.CopyFrom(event)
    elif isinstance(event, generation_pb2.Finished):
        response.finished.CopyFrom(event)
    elif isinstance(event, generation_pb2.PromptLogprobs):
        response.prompt_logprobs.CopyFrom(event)
    return response


def _part_to_wire(part: Part) -> generation_pb2.DeltaPart:
    if part.kind is PartKind.TEXT:
        return generation_pb2.DeltaPart(text=part.text)
    if part.kind is PartKind.REASONING:
        return generation_pb2.DeltaPart(reasoning=part.text)
    call = generation_pb2.ToolCallDelta(index=part.number, id=part.call_id, name=part.name, arguments=part.text)
    return generation_pb2.DeltaPart(tool_call=call)
