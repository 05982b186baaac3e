"""Checks of every public field, as pure functions that raise StatusError.

A refusal names the field as a path from the request (`sampling.top_p`, `stop[2]`, `chat.messages[0].role`) and the
limit. Every comparison is written so that NaN fails it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import MAX_N, REQUEST, SAMPLING_LISTS, sampling_faults
from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.services.tokenizer.template_kwargs import read_template_kwargs
from scalellm.services.tokenizer.tools import validate_tools
from scalellm.v1 import common_pb2, generation_pb2, sessions_pb2, tokenizer_pb2

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def validate_generate(request: generation_pb2.GenerateRequest, limits: RequestLimits, vocab_size: int) -> None:
    """Check the fields of a request. Its length is checked by `fit_context`, once the prompt is known."""
    if request.HasField("request_id"):
        validate_id(request.request_id, "request_id")
    match request.WhichOneof("input"):
        case "prompt":
            _check_bytes(request.prompt, limits.max_prompt_bytes, "prompt")
        case "chat":
            validate_chat(request.chat, limits)
        case "tokens":
            if not request.tokens.ids:
                raise StatusError.invalid("tokens.ids", "must hold at least one token id")
            _check_num_tokens(len(request.tokens.ids), limits, "tokens.ids")
            _check_token_ids(request.tokens.ids, vocab_size, "tokens.ids")
        case _:
            raise StatusError.invalid("input", "one of prompt, chat and tokens must be set")
    validate_sampling(request.sampling, vocab_size)
    _validate_stops(request.stop, limits)
    if request.HasField("session_id"):
        _validate_session(request)
    if request.HasField("cache_salt"):
        _check_length(request.cache_salt, limits.max_cache_salt_bytes, "cache_salt")
    _check_numbers(request)
    if request.on_disconnect not in generation_pb2.OnDisconnect.values():
        raise StatusError.invalid("on_disconnect", f"must be a value of OnDisconnect, got {request.on_disconnect}")
    if request.output not in generation_pb2.Output.values():
        raise StatusError.invalid("output", f"must be a value of Output, got {request.output}")
    if request.output == generation_pb2.OUTPUT_TOKEN_IDS and request.stop:
        raise StatusError.invalid("stop", "needs text: must be empty with output OUTPUT_TOKEN_IDS")
    _check_bytes(request.prediction, limits.max_prediction_bytes, "prediction")
    if request.reasoning.HasField("effort"):
        _check_length(request.reasoning.effort, limits.max_effort_bytes, "reasoning.effort")
    if request.reasoning.HasField("budget_tokens"):
        most = limits.max_token_ids
        if request.reasoning.budget_tokens > most:
            raise StatusError.invalid(
                "reasoning.budget_tokens", f"must be at most {most}, got {request.reasoning.budget_tokens}"
            )


def validate_resume(request: generation_pb2.ResumeRequest) -> None:
    """Check the fields of a request."""
    validate_id(request.request_id, "request_id")
    if len(request.offsets) > MAX_N:
        raise StatusError.invalid("offsets", f"must have at most {MAX_N} entries, got {len(request.offsets)}")
    _check_numbers(request)


def validate_sampling(sampling: common_pb2.SamplingParams, vocab_size: int) -> None:
    """Check every field of the sampling parameters."""
    for name, fault in sampling_faults({field.name: value for field, value in sampling.ListFields()}):
        raise StatusError.invalid(f"sampling.{name}", fault)
    biased: set[int] = set()
    for index, entry in enumerate(sampling.logit_bias):
        field = f"sampling.logit_bias[{index}]"
        if entry.token_id >= vocab_size:
            raise StatusError.invalid(
                f"{field}.token_id", f"must be below the vocabulary size {vocab_size}, got {entry.token_id}"
            )
        if entry.token_id in biased:
            raise StatusError.invalid(f"{field}.token_id", f"must be named once, got {entry.token_id} again")
        biased.add(entry.token_id)
        if fault := SAMPLING_LISTS["logit_bias"].entry_fault(entry.bias):
            raise StatusError.invalid(f"{field}.bias", fault)
    _check_token_ids(sampling.stop_token_ids, vocab_size, "sampling.stop_token_ids")


def validate_chat(chat: generation_pb2.Chat, limits: RequestLimits) -> None:
    """Check a conversation."""
    messages = chat.messages
    if not 1 <= len(messages) <= limits.max_messages:
        raise StatusError.invalid(
            "chat.messages", f"must hold 1 to {limits.max_messages} messages, got {len(messages)}"
        )
    total = 0
    for index, message in enumerate(messages):
        total += _check_length(message.role, limits.max_role_bytes, f"chat.messages[{index}].role")
        total += _num_bytes(message.content)
    total += validate_tools(chat)
    if total > limits.max_prompt_bytes:
        raise StatusError.invalid(
            "chat.messages", f"must hold at most {limits.max_prompt_bytes} bytes of text in all, got {total}"
        )
    _check_bytes(chat.template_kwargs, limits.max_template_kwargs_bytes, "chat.template_kwargs")
    read_template_kwargs(chat.template_kwargs)
    if chat.continue_final_message and chat.add_generation_prompt:
        raise StatusError.invalid("chat.continue_final_message", "must be false where add_generation_prompt is true")


def fit_context(request: generation_pb2.GenerateRequest, prompt_tokens: int, max_model_len: int) -> int:
    """Return how many tokens may be generated after a prompt of `prompt_tokens`, at least 1.

    Raises StatusError when prompt, max_tokens or min_tokens do not fit a context of `max_model_len` tokens.
    """
    field = request.WhichOneof("input") or "input"
    if prompt_tokens == 0:
        raise StatusError.invalid(field, "must not be empty: it has no tokens")
    room = max_model_len - prompt_tokens
    if room < 1:
        raise context_exceeded(request, max_model_len, str(prompt_tokens))
    for name in ("max_tokens", "min_tokens"):
        value = getattr(request.sampling, name)
        if value > room:
            raise StatusError.invalid(
                f"sampling.{name}",
                f"must be at most {room} (the model's context holds {max_model_len} tokens, the prompt has "
                f"{prompt_tokens}), got {value}",
            )
    return request.sampling.max_tokens or room


def context_exceeded(request: generation_pb2.GenerateRequest, max_model_len: int, got: str) -> StatusError:
    """Return the error for a prompt that leaves no room for output in a context of `max_model_len` tokens."""
    return StatusError.invalid(
        request.WhichOneof("input") or "input",
        f"must have at most {max_model_len - 1} tokens (the model's context holds {max_model_len}, "
        f"prompt and output together), got {got}",
    )


def check_prompt_tokens(
    request: generation_pb2.GenerateRequest,
    token_ids: Sequence[int],
    vocab_size: int,
    token_text: Callable[[int], str | None],
) -> None:
    """Raise StatusError for a text with a token that the tokenizer has but the model's vocabulary has not.

    Args:
        request: The request.
        token_ids: Token ids of its text.
        vocab_size: Upper bound (exclusive) of the model's token ids.
        token_text: Returns the text of a token id.
    """
    if not token_ids or max(token_ids) < vocab_size:
        return
    token_id = next(token_id for token_id in token_ids if token_id >= vocab_size)
    text = token_text(token_id) or ""
    field = request.WhichOneof("input") or "input"
    if field == "chat":
        messages = request.chat.messages
        field = next((f"chat.messages[{i}].content" for i, m in enumerate(messages) if text in m.content), field)
    raise StatusError.invalid(
        field,
        f"must not hold the text {text!r}: it is the special token {token_id}, and this model has only the tokens "
        f"below {vocab_size}",
    )


def validate_encode(request: tokenizer_pb2.EncodeRequest, limits: RequestLimits) -> None:
    """Check a text to encode."""
    _check_bytes(request.text, limits.max_prompt_bytes, "text")


def too_many_tokens(field: str, max_tokens: int, got: str) -> StatusError:
    """Return the error for a text in `field` that has more tokens than an answer may contain."""
    return StatusError.invalid(field, f"must have at most {max_tokens} tokens, got {got}")


def validate_decode(request: tokenizer_pb2.DecodeRequest, limits: RequestLimits, vocab_size: int) -> None:
    """Check tokens to decode."""
    _check_num_tokens(len(request.token_ids), limits, "token_ids")
    _check_token_ids(request.token_ids, vocab_size, "token_ids")


def validate_page_size(
    request: sessions_pb2.ListSessionsRequest | sessions_pb2.GetSessionRequest, limits: RequestLimits
) -> int | None:
    """Return how many entries a page may have; None if the request does not set it. Raises StatusError."""
    if not request.HasField("page_size"):
        return None
    check_page_size(request.page_size, limits)
    return request.page_size


def check_page_size(page_size: int, limits: RequestLimits) -> None:
    """Check the number of entries of a page."""
    _check_count(page_size, 1, limits.max_page_size, "page_size")


def is_id(value: str) -> bool:
    """True if a text can be a request's or a session's id."""
    return _ID.fullmatch(value) is not None


def validate_id(value: str, field: str) -> None:
    """Check a request's or a session's id."""
    if not is_id(value):
        got = repr(value) if len(value) <= 128 else f"{len(value)} characters"
        raise StatusError.invalid(field, f"must be 1 to 128 characters of [A-Za-z0-9._:-], got {got}")


def _check_numbers(request: generation_pb2.GenerateRequest | generation_pb2.ResumeRequest) -> None:
    """Check the fields beside the sampling parameters that hold a number."""
    for field, value in request.ListFields():
        if (rule := REQUEST.get(field.name)) is not None and (fault := rule.fault(value)):
            raise StatusError.invalid(field.name, fault)


def _validate_session(request: generation_pb2.GenerateRequest) -> None:
    validate_id(request.session_id, "session_id")
    if request.WhichOneof("input") != "chat":
        raise StatusError.invalid("session_id", f"needs chat as the input, got {request.WhichOneof('input')}")
    if request.chat.HasField("add_generation_prompt") and not request.chat.add_generation_prompt:
        raise StatusError.invalid(
            "chat.add_generation_prompt", "must be true with session_id: a turn ends in an answer"
        )
    if request.chat.continue_final_message:
        raise StatusError.invalid(
            "chat.continue_final_message", "must be false with session_id: a turn begins with what was asked"
        )
    if request.sampling.HasField("n") and request.sampling.n != 1:
        raise StatusError.invalid("sampling.n", f"must be 1 with session_id, got {request.sampling.n}")


def _validate_stops(stops: Sequence[str], limits: RequestLimits) -> None:
    if len(stops) > limits.max_stops:
        raise StatusError.invalid("stop", f"must have at most {limits.max_stops} entries, got {len(stops)}")
    for index, stop in enumerate(stops):
        _check_length(stop, limits.max_stop_bytes, f"stop[{index}]")


def _check_num_tokens(num_tokens: int, limits: RequestLimits, field: str) -> None:
    if num_tokens > limits.max_token_ids:
        raise StatusError.invalid(field, f"must hold at most {limits.max_token_ids} token ids, got {num_tokens}")


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        index = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise StatusError.invalid(
            f"{field}[{index}]", f"must be below the vocabulary size {vocab_size}, got {token_ids[index]}"
        )


def _check_count(value: int, low: int, high: int, field: str) -> None:
    if not low <= value <= high:
        raise StatusError.invalid(field, f"must be in [{low}, {high}], got {value}")


def _check_length(text: str, limit: int, field: str) -> int:
    """Return the size of `text` in bytes. Raises StatusError if it is empty or longer than `limit`."""
    size = _num_bytes(text)
    if not 1 <= size <= limit:
        raise StatusError.invalid(field, f"must have 1 to {limit} bytes, got {size}")
    return size


def _check_bytes(text: str, limit: int, field: str) -> None:
    size = _num_bytes(text)
    if size > limit:
        raise StatusError.invalid(field, f"must have at most {limit} bytes, got {size}")


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
