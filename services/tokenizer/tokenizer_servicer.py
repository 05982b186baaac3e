"""`scalellm.v1.Tokenizer`: encoding and decoding of text, without generating."""

from __future__ import annotations

import grpc

from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.tokenizing import Tokenizing
from scalellm.v1 import tokenizer_pb2


class TokenizerServicer:
    """Serves Encode, Decode, ApplyChatTemplate and GetInfo. Raises StatusError for every outcome but OK.

    Args:
        edge: The worker.
    """

    def __init__(self, edge: Edge) -> None:
        self._access = edge.access
        self._models = edge.models

    async def Encode(
        self, request: tokenizer_pb2.EncodeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.EncodeResponse:
        """Encode text to token ids."""
        return await self._tokenizing(request.model).encode(request, self._caller())

    async def Decode(
        self, request: tokenizer_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.DecodeResponse:
        """Decode token ids to text."""
        return await self._tokenizing(request.model).decode(request, self._caller())

    async def ApplyChatTemplate(
        self, request: tokenizer_pb2.ApplyChatTemplateRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.ApplyChatTemplateResponse:
        """Render messages to the text and the tokens that Generate would use."""
        return await self._tokenizing(request.model).apply_chat_template(request, self._caller())

    async def GetInfo(
        self, request: tokenizer_pb2.GetInfoRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.GetInfoResponse:
        """Return the served model and the limits in force."""
        return self._tokenizing(request.model).info()

    def _tokenizing(self, model: str) -> Tokenizing:
        return Tokenizing(self._models.choose(model or None))

    def _caller(self) -> str:
        return self._access.tenant().name
