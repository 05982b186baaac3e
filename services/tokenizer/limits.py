"""Limits on the sizes of requests, as documented in the protos and reported by GetInfo.

Limits of sampling fields and of the shape of answers are in `services/common/field_rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from scalellm.services.common.field_rules import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_PREDICTION,
    MAX_STRUCTURE_BYTES,
    SAMPLING_LISTS,
)
from scalellm.v1 import tokenizer_pb2

MAX_ANSWER_BYTES = 4 * 2**20
"""Most bytes of one message to a client: the default limit of gRPC clients."""

MAX_ANSWER_TOKENS = 4096
"""Most tokens in one message of a stream, whose texts, ids and log-probabilities with 20 alternatives take below 1
MiB."""

INLINE_TOKENS = 4096
"""Up to this many tokens are turned into text on the event loop, in about a millisecond."""

_MAX_TOKEN_ID_BYTES = 4
_MAX_BESIDE_INPUT_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of a request. Sizes of texts are in bytes of UTF-8."""

    max_prompt_bytes: int = 2**20
    max_messages: int = 1024
    max_prompts: int = 256
    max_role_bytes: int = 64
    max_stops: int = 16
    max_stop_bytes: int = 256
    max_cache_salt_bytes: int = 128
    max_template_kwargs_bytes: int = 2**14
    max_token_ids: int = 2**18
    max_page_size: int = 1000
    max_effort_bytes: int = 32
    max_prediction_bytes: int = MAX_PREDICTION

    @property
    def max_request_bytes(self) -> int:
        """Most bytes of one message from a client: its text or its token ids, the shape of its answer, its prediction,
        and 64 KiB for all other fields.

        It limits the cost of parsing a request before any check: from 1 MiB of empty chat messages, protobuf makes 28
        MiB of objects in some 40 ms.
        """
        longest_input = max(self.max_prompt_bytes, _MAX_TOKEN_ID_BYTES * self.max_token_ids)
        return longest_input + MAX_STRUCTURE_BYTES + self.max_prediction_bytes + _MAX_BESIDE_INPUT_BYTES

    @property
    def max_body_bytes(self) -> int:
        """Most bytes of an HTTP client's JSON, which may write each byte of a text as three, as \u0451 for ё."""
        texts = self.max_prompt_bytes + MAX_STRUCTURE_BYTES + self.max_prediction_bytes
        return 3 * texts + _MAX_BESIDE_INPUT_BYTES

    def to_wire(self) -> tokenizer_pb2.Limits:
        """Return the limits that GetInfo reports."""
        return tokenizer_pb2.Limits(
            max_prompt_bytes=self.max_prompt_bytes,
            max_messages=self.max_messages,
            max_n=MAX_N,
            max_stops=self.max_stops,
            max_stop_bytes=self.max_stop_bytes,
            max_stop_token_ids=SAMPLING_LISTS["stop_token_ids"].most,
            max_logprobs=MAX_LOGPROBS,
            max_logit_bias=SAMPLING_LISTS["logit_bias"].most,
            max_token_ids=self.max_token_ids,
            max_request_bytes=self.max_request_bytes,
            max_structure_bytes=MAX_STRUCTURE_BYTES,
        )
