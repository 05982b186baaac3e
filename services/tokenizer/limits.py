"""Limits on requests, as documented in the protos and told by GetInfo."""

from __future__ import annotations

from dataclasses import dataclass

from scalellm.v1 import tokenizer_pb2


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may hold. Sizes of texts are in bytes of UTF-8."""

    max_prompt_bytes: int = 2**20
    max_messages: int = 1024
    max_role_bytes: int = 64
    max_n: int = 16
    max_stops: int = 16
    max_stop_bytes: int = 256
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_stream_interval: int = 1024
    max_decode_tokens: int = 2**20
    max_page_size: int = 1000

    def to_wire(self) -> tokenizer_pb2.Limits:
        """The part that GetInfo tells."""
        return tokenizer_pb2.Limits(
            max_prompt_bytes=self.max_prompt_bytes,
            max_messages=self.max_messages,
            max_n=self.max_n,
            max_stops=self.max_stops,
            max_stop_bytes=self.max_stop_bytes,
            max_stop_token_ids=self.max_stop_token_ids,
            max_logprobs=self.max_logprobs,
            max_logit_bias=self.max_logit_bias,
        )
