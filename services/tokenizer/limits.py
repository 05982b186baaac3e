"""Limits on requests, as documented in the protos and told by GetInfo."""

from __future__ import annotations

from dataclasses import dataclass

from scalellm.v1 import tokenizer_pb2

MAX_ANSWER_BYTES = 4 * 2**20
"""Of one message to a client: what gRPC clients take unless they are told otherwise."""

MAX_ANSWER_TOKENS = 4096
"""Tokens whose text, ids and log-probabilities one message of a stream holds: below 1 MiB with 20 alternatives each."""

INLINE_TOKENS = 4096
"""Up to this many tokens are turned into text on the event loop, in about a millisecond."""

_MAX_TOKEN_ID_BYTES = 4
_MAX_BESIDE_INPUT_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may hold. Sizes of texts are in bytes of UTF-8."""

    max_prompt_bytes: int = 2**20
    max_messages: int = 1024
    max_prompts: int = 256
    max_role_bytes: int = 64
    max_n: int = 16
    max_stops: int = 16
    max_stop_bytes: int = 256
    max_cache_salt_bytes: int = 128
    max_template_kwargs_bytes: int = 2**14
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_stream_interval: int = 1024
    max_token_ids: int = 2**18
    max_page_size: int = 1000
    max_structure_bytes: int = 2**16
    max_choices: int = 1024
    max_tag_structures: int = 64

    @property
    def max_request_bytes(self) -> int:
        """Of one message from a client: its text or its token ids, the shape of its answer, and 64 KiB for all that
        stands beside them.

        It is what a request costs before anything in it is looked at: protobuf makes 28 MiB of objects, in some 40 ms,
        of a MiB of empty chat messages.
        """
        longest_input = max(self.max_prompt_bytes, _MAX_TOKEN_ID_BYTES * self.max_token_ids)
        return longest_input + self.max_structure_bytes + _MAX_BESIDE_INPUT_BYTES

    @property
    def max_body_bytes(self) -> int:
        """Of the JSON that an HTTP client sends: JSON may write each byte of a text as three, as \\u0451 for ё."""
        return 3 * (self.max_prompt_bytes + self.max_structure_bytes) + _MAX_BESIDE_INPUT_BYTES

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
            max_token_ids=self.max_token_ids,
            max_request_bytes=self.max_request_bytes,
            max_structure_bytes=self.max_structure_bytes,
        )
