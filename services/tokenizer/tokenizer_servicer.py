"""`scalellm.v1.Tokenizer`: text to tokens and back, without generating."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

import grpc

from scalellm.v1 import tokenizer_pb2
from services.tokenizer.generation import Edge
from services.tokenizer.validation import validate_chat, validate_decode, validate_encode, validate_encoded

_INLINE_TOKENS = 4096
"""Up to this many tokens are decoded on the event loop, in about a millisecond."""


class TokenizerServicer:
    """Serves Encode, Decode, ApplyChatTemplate and GetInfo. Raises StatusError for every outcome but OK.

    Args:
        edge: The worker.
    """

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._prompts = edge.prompts
        self._tokenizer = edge.prompts.model.tokenizer

    async def Encode(
        self, request: tokenizer_pb2.EncodeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.EncodeResponse:
        """Text to token ids."""
        validate_encode(request, self._edge.limits)
        adds_special = not request.HasField("add_special_tokens") or request.add_special_tokens
        token_ids = await self._prompts.encode(request.text, add_special_tokens=adds_special)
        validate_encoded(token_ids, "text", self._edge.limits)
        to_token = self._tokenizer.id_to_token
        return tokenizer_pb2.EncodeResponse(
            token_ids=token_ids, tokens=[to_token(token_id) or "" for token_id in token_ids]
        )

    async def Decode(
        self, request: tokenizer_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.DecodeResponse:
        """Token ids to text."""
        known = max(self._edge.vocab_size, self._edge.tokenizer_size)
        validate_decode(request, self._edge.limits, known)
        skips_special = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        token_ids = list(request.token_ids)
        if len(token_ids) <= _INLINE_TOKENS:
            return tokenizer_pb2.DecodeResponse(text=self._decode(token_ids, skips_special))
        return tokenizer_pb2.DecodeResponse(text=await asyncio.to_thread(self._decode, token_ids, skips_special))

    async def ApplyChatTemplate(
        self, request: tokenizer_pb2.ApplyChatTemplateRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.ApplyChatTemplateResponse:
        """Messages to the text and the tokens that Generate would use."""
        validate_chat(request.chat, self._edge.limits)
        text = await self._prompts.render(request.chat)
        token_ids = await self._prompts.encode_rendered(text)
        validate_encoded(token_ids, "chat", self._edge.limits)
        return tokenizer_pb2.ApplyChatTemplateResponse(text=text, token_ids=token_ids)

    async def GetInfo(
        self, request: tokenizer_pb2.GetInfoRequest, context: grpc.aio.ServicerContext
    ) -> tokenizer_pb2.GetInfoResponse:
        """What is served here, and the limits in force."""
        model, welcome = self._prompts.model, self._edge.link.welcome
        return tokenizer_pb2.GetInfoResponse(
            model=self._edge.model_name,
            vocab_size=self._edge.vocab_size,
            max_model_len=welcome.max_model_len if welcome is not None else 0,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=self._prompts.has_chat_template,
            tokenizer_sha256=model.sha256,
            version=version("scalellm"),
            limits=self._edge.limits.to_wire(),
        )

    def _decode(self, token_ids: list[int], skips_special: bool) -> str:
        detokenizer = self._prompts.texts.detokenizer(skip_special_tokens=skips_special)
        return detokenizer.push(token_ids) + detokenizer.flush()
