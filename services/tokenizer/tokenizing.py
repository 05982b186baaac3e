"""Encoding and decoding of text, without generating, for all protocols."""

from __future__ import annotations

from scalellm import __version__
from scalellm.services.tokenizer.generation.edge import Edge
from scalellm.services.tokenizer.limits import INLINE_TOKENS
from scalellm.services.tokenizer.validation import validate_chat, validate_decode, validate_encode
from scalellm.v1 import tokenizer_pb2


class Tokenizing:
    """Implements the calls of scalellm.v1.Tokenizer. Raises StatusError for every outcome but an answer.

    `caller` is the name of the tenant whose turn a long text takes.

    Args:
        edge: The worker.
    """

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._prompts = edge.prompts

    async def encode(self, request: tokenizer_pb2.EncodeRequest, caller: str) -> tokenizer_pb2.EncodeResponse:
        """Encode text to token ids."""
        validate_encode(request, self._edge.limits)
        adds_special = not request.HasField("add_special_tokens") or request.add_special_tokens
        most = self._edge.limits.max_token_ids
        token_ids = await self._prompts.encode(
            request.text, "text", caller=caller, max_tokens=most, add_special_tokens=adds_special
        )
        if len(token_ids) <= INLINE_TOKENS:
            return self._encoded(token_ids)
        return await self._prompts.run(caller, lambda: self._encoded(token_ids))

    async def decode(self, request: tokenizer_pb2.DecodeRequest, caller: str) -> tokenizer_pb2.DecodeResponse:
        """Decode token ids to text."""
        known = max(self._edge.vocab_size, self._edge.tokenizer_size)
        validate_decode(request, self._edge.limits, known)
        skips_special = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        token_ids = list(request.token_ids)
        if len(token_ids) <= INLINE_TOKENS:
            return tokenizer_pb2.DecodeResponse(text=self._decode(token_ids, skips_special))
        text = await self._prompts.run(caller, lambda: self._decode(token_ids, skips_special))
        return tokenizer_pb2.DecodeResponse(text=text)

    async def apply_chat_template(
        self, request: tokenizer_pb2.ApplyChatTemplateRequest, caller: str
    ) -> tokenizer_pb2.ApplyChatTemplateResponse:
        """Render messages to the text and the tokens that Generate would use."""
        validate_chat(request.chat, self._edge.limits)
        most = self._edge.limits.max_token_ids
        text = await self._prompts.render(request.chat, caller=caller)
        token_ids = await self._prompts.encode(text, "chat", caller=caller, max_tokens=most)
        return tokenizer_pb2.ApplyChatTemplateResponse(text=text.plain, token_ids=token_ids)

    def info(self) -> tokenizer_pb2.GetInfoResponse:
        """Return the served model and the limits in force."""
        model, welcome = self._prompts.model, self._edge.schedulers.welcome
        return tokenizer_pb2.GetInfoResponse(
            model=self._edge.model_name,
            vocab_size=self._edge.vocab_size,
            max_model_len=welcome.max_model_len if welcome is not None else 0,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=self._prompts.has_chat_template,
            tokenizer_sha256=model.sha256,
            version=__version__,
            limits=self._edge.limits.to_wire(),
            sampling_defaults=self._edge.sampling_defaults,
            models=self._edge.models.names,
            aliases=self._edge.models.aliases,
        )

    def _encoded(self, token_ids: list[int]) -> tokenizer_pb2.EncodeResponse:
        tokens = self._prompts.texts.tokens
        return tokenizer_pb2.EncodeResponse(token_ids=token_ids, tokens=[tokens[token_id] for token_id in token_ids])

    def _decode(self, token_ids: list[int], skips_special: bool) -> str:
        detokenizer = self._prompts.texts.detokenizer(skip_special_tokens=skips_special)
        return detokenizer.push(token_ids) + detokenizer.flush()
