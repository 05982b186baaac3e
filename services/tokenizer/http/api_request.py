"""The common part of the requests of all APIs: reading them from JSON, and their sampling fields.

Only types are checked here. Ranges are checked by the request path, for every protocol. Its errors name our fields, and
`param_of` translates these to the client's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import SAMPLING
from scalellm.services.common.sent_text import as_text
from scalellm.services.tokenizer.json_object import JsonObject
from scalellm.v1 import common_pb2, generation_pb2

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
OnDisconnect = Literal["keep", "cancel"]
"""Fate of a request whose client leaves."""

Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]

_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "include_stop": "include_stop_str_in_output",
        "tokens.ids": "prompt",
        "chat.messages": "messages",
        "chat": "messages",
        "chat.add_generation_prompt": "add_generation_prompt",
        "chat.continue_final_message": "continue_final_message",
        "chat.template_kwargs": "chat_template_kwargs",
    }
)


class ApiRequest(BaseModel):
    """A request of one API, as its clients send it. `null` is the same as no value at all.

    Attributes:
        refused: Unsupported fields that would change the answer, with the values that are accepted because they do not.
        ignored: Known fields that have no effect here.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)

    refused: ClassVar[Mapping[str, Sequence[object]]] = MappingProxyType({})
    ignored: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def read(cls, body: JsonObject, *, is_strict: bool) -> Self:
        """Return the request that a body holds. Raises StatusError that names the field.

        Args:
            body: Parsed JSON.
            is_strict: Refuse fields that are not known.
        """
        for name, harmless in cls.refused.items():
            value = body.get(name)
            if value is not None and not any(type(value) is type(other) and value == other for other in harmless):
                raise StatusError.invalid(name, "is not supported here")
        if is_strict:
            known = cls.model_fields.keys() | cls.refused.keys() | cls.ignored
            if unknown := body.keys() - known:
                raise StatusError.invalid(min(unknown)[:64], "is not a field of this request")
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise StatusError.invalid(_path(first["loc"]), _lower(first["msg"])) from None


class StreamOptions(ApiRequest):
    """Options for the contents of a stream in addition to its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(ApiRequest):
    """The fields of OpenAI's APIs, and of vLLM's additions to them, for sampling and streaming."""

    model: str | None = None
    n: UInt32 | None = None
    max_tokens: UInt32 | None = None
    min_tokens: UInt32 | None = None
    temperature: float | None = None
    top_k: Int32 | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Seed | None = None
    stop: Any = None
    stop_token_ids: list[UInt32] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: UInt32 | None = None
    priority: Int32 | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: UInt32 | None = None
    return_token_ids: bool | None = None
    on_disconnect: OnDisconnect | None = None

    ignored = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
    )

    def to_generate(self, request_id: str) -> generation_pb2.GenerateRequest:
        """Return the request without its input. Raises StatusError.

        Args:
            request_id: Its id, unless it names one itself.
        """
        request = generation_pb2.GenerateRequest(request_id=request_id)
        if self.request_id is not None:
            request.request_id = as_text(self.request_id, "request_id")
        self._set_sampling(request.sampling)
        request.stop.extend(_stops(self.stop))
        if self.cache_salt is not None:
            request.cache_salt = as_text(self.cache_salt, "cache_salt")
        set_present(request, self, ("skip_special_tokens", "priority", "stream_interval"))
        if self.return_token_ids:
            request.return_prompt_token_ids = True
        if self.include_stop_str_in_output is not None:
            request.include_stop = self.include_stop_str_in_output
        if self.is_kept:
            request.on_disconnect = generation_pb2.ON_DISCONNECT_KEEP
        return request

    def _set_sampling(self, sampling: common_pb2.SamplingParams) -> None:
        set_present(sampling, self, _SAME)
        if self.top_k is not None:
            if self.top_k < -1:
                raise StatusError.invalid("top_k", f"must be at least -1, which is off as 0 is, got {self.top_k}")
            sampling.top_k = max(0, self.top_k)
        if self.seed is not None:
            sampling.seed = self.seed % 2**64
        if self.stop_token_ids:
            sampling.stop_token_ids.extend(self.stop_token_ids)
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < 2**32):
                raise StatusError.invalid("logit_bias", f"must have token ids as its keys, got {key[:32]!r}")
            sampling.logit_bias.add(token_id=int(key), bias=bias)

    @property
    def is_kept(self) -> bool:
        """True if the answer shall outlive its call."""
        return self.on_disconnect == "keep"

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """True if each chunk of a stream contains the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


_SAME = tuple(name for name in SAMPLING if name in SamplingRequest.model_fields and name not in ("top_k", "seed"))
"""Sampling fields that mean the same here as in our own API."""


def set_present(target: object, source: object, names: Iterable[str]) -> None:
    """Copy the named attributes that have a value."""
    for name in names:
        if (value := getattr(source, name)) is not None:
            setattr(target, name, value)


def param_of(field: str, names: Mapping[str, str]) -> str:
    """Translate one of our field names to the client's: `sampling.top_p` is `top_p`, `tokens.ids[3]` is `prompt[3]`.

    Args:
        field: Path from GenerateRequest.
        names: The client's names by prefixes of our paths, where they differ. The longest matching prefix counts.
    """
    names = {**_NAMES, **names}
    head = field
    while head:
        if head in names:
            return names[head] + field[len(head) :]
        head = head[: max(head.rfind("."), head.rfind("["), 0)]
    return field.removeprefix("sampling.")


def renamed(error: StatusError, names: Mapping[str, str]) -> StatusError:
    """Return the error with the client's names of fields."""
    if not error.field:
        return error
    param = param_of(error.field, names)
    message = error.message
    if message.startswith(error.field):
        message = param + message[len(error.field) :]
    return StatusError(error.code, message, field=param, retry_after=error.retry_after)


def _stops(value: object) -> Sequence[str]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (as_text(value, "stop"),)
    if not isinstance(value, list):
        raise StatusError.invalid("stop", "must be a string or a list of strings")
    return [as_text(item, f"stop[{index}]") for index, item in enumerate(value)]


def _path(parts: Sequence[str | int]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)[:64]
    return path


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
