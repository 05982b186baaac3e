"""vLLM's /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import hdrs, web

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text
from scalellm.services.tokenizer.call_bytes import CallAccount
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.http.api_request import ApiRequest, UInt32, renamed
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.face import HttpFace
from scalellm.services.tokenizer.http.messages import add_messages
from scalellm.services.tokenizer.http.service_routes import json_answer
from scalellm.services.tokenizer.http.template_fields import TemplateFields
from scalellm.services.tokenizer.http.tool_fields import set_tools, tool_names
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.services.tokenizer.tokenizing import Tokenizing
from scalellm.v1 import tokenizer_pb2


class TokenizeRequest(TemplateFields):
    """A text, or a conversation, to encode."""

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    tools: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ApiRequest):
    """Tokens to decode."""

    model: str | None = None
    tokens: list[UInt32]
    skip_special_tokens: bool | None = None


class TokenizeRoutes:
    """Encodes and decodes.

    Args:
        edge: The worker.
        is_strict: Refuse fields that are not known.
    """

    def __init__(self, edge: Edge, *, is_strict: bool) -> None:
        self._edge = edge
        self._is_strict = is_strict

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the routes."""
        face.add_body(app, "/tokenize", self.tokenize)
        face.add_body(app, "/detokenize", self.detokenize)
        face.add(app, hdrs.METH_GET, "/tokenizer_info", self.info)

    async def tokenize(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Encode text or messages to the token ids that a request with them would give the model."""
        tenant = self._edge.access.tenant()
        async with self._edge.quotas.admitted(tenant):
            request = TokenizeRequest.read(body, is_strict=self._is_strict)
            edge = self._edge.models.choose(request.model)
            try:
                token_ids = await _encode(edge, request, tenant.name)
            except StatusError as error:
                raise renamed(error, {**_NAMES, **tool_names(request.tools, ".function")}) from None
        welcome, tokens = edge.schedulers.welcome, edge.prompts.texts.tokens
        return json_answer(
            {
                "count": len(token_ids),
                "max_model_len": welcome.max_model_len if welcome is not None else None,
                "tokens": token_ids,
                "token_strs": [tokens[token_id] for token_id in token_ids] if request.return_token_strs else None,
            }
        )

    async def detokenize(self, call: HttpCall, body: JsonObject, account: CallAccount) -> web.StreamResponse:
        """Decode token ids to text."""
        tenant = self._edge.access.tenant()
        async with self._edge.quotas.admitted(tenant):
            request = DetokenizeRequest.read(body, is_strict=self._is_strict)
            edge = self._edge.models.choose(request.model)
            # Special tokens are shown, as vLLM shows them.
            skips = bool(request.skip_special_tokens)
            asked = tokenizer_pb2.DecodeRequest(token_ids=request.tokens, skip_special_tokens=skips)
            try:
                answer = await Tokenizing(edge).decode(asked, tenant.name)
            except StatusError as error:
                raise renamed(error, _NAMES) from None
        return json_answer({"prompt": answer.text})

    async def info(self, call: HttpCall) -> web.StreamResponse:
        """Answer with facts about the tokenizer. `bos_token` and others stand where tokenizer_config.json has them."""
        edge = self._edge.models.choose(call.request.query.get("model"))
        info, model = Tokenizing(edge).info(), edge.prompts.model
        return json_answer(
            {
                "model": info.model,
                "vocab_size": info.vocab_size,
                "max_model_len": info.max_model_len or None,
                "eos_token_ids": list(info.eos_token_ids),
                **model.special_tokens,
                "special_tokens": dict(edge.prompts.texts.special_ids),
                "chat_template": model.chat_template,
                "sha256": info.tokenizer_sha256.hex(),
            }
        )


async def _encode(edge: Edge, request: TokenizeRequest, caller: str) -> list[int]:
    if request.messages is None:
        if request.prompt is None:
            raise StatusError.invalid("prompt", "or messages must be given")
        text = tokenizer_pb2.EncodeRequest(text=as_text(request.prompt, "prompt"))
        if request.add_special_tokens is not None:
            text.add_special_tokens = request.add_special_tokens
        return list((await Tokenizing(edge).encode(text, caller)).token_ids)
    asked = tokenizer_pb2.ApplyChatTemplateRequest()
    add_messages(asked.chat, request.messages)
    asked.chat.content_is_text = edge.prompts.can_take_content_as_text
    request.set_template(asked.chat)
    set_tools(asked.chat, request.tools, None, is_parallel=None)
    return list((await Tokenizing(edge).apply_chat_template(asked, caller)).token_ids)


_NAMES: Mapping[str, str] = {"text": "prompt", "token_ids": "tokens"}
