"""Bodies of the HTTP endpoints as JSON: every field known, and with what nobody would write in it.

Nearly all of a body is plausible and short, so that it comes as far as the odd parts matter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from scalellm.services.tokenizer.http.api_request import ApiRequest
from scalellm.services.tokenizer.http.chat_request import ChatRequest
from scalellm.services.tokenizer.http.completion_request import CompletionRequest
from scalellm.services.tokenizer.http.messages_request import MessagesRequest
from scalellm.services.tokenizer.http.responses_request import ResponsesRequest
from scalellm.services.tokenizer.http.tokenize_routes import DetokenizeRequest, TokenizeRequest

ENDPOINTS: Mapping[str, type[ApiRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": MessagesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

_WILDNESS = (0.0, 0.05, 0.2, 0.5)
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_MESSAGES = [{"role": "user", "content": "Hi"}]
_NUMBERS = (0, 1, -1, 0.5, 2, 20, 2**31, 2**32, 2**53, -(2**63), 2**64, 10**300, 1e-45, 1e308, -0.0)
_TEXTS = (
    *("", "a", "Hi", "\0", "\ud800", "\U0001f600" * 999, "<|im_end|>", "{{ 1 }}", "../../etc/passwd", "a" * 70_000),
    *("\u202e", "\x1b[2J", "\n" * 500, "tokens", "__class__", "none", "auto", "-1", "1e3"),
)
_PLAUSIBLE: Mapping[str, tuple[Any, ...]] = {
    "messages": (_MESSAGES, [*_MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]),
    "prompt": ("Hi", ["Hi", "you"], [1, 2, 3], [[1, 2], [3]]),
    "input": ("Hi", _MESSAGES),
    "tokens": ([1, 2, 3],),
    "max_tokens": (1, 3, 20),
    "max_completion_tokens": (1, 3),
    "max_output_tokens": (1, 3),
    "model": ("smollm2-135m-instruct",),
    "stop": ("a", ["a", "bc"]),
    "stop_sequences": (["a"],),
    "stop_token_ids": ([1, 2],),
    "logit_bias": ({"5": -100, "6": 1.5},),
    "stream_options": ({"include_usage": True, "continuous_usage_stats": True},),
    "chat_template_kwargs": ({"enable_thinking": False}, {"a": [[{"b": None}]]}),
    "response_format": (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
    ),
    "structured_outputs": ({"regex": "[ab]{3}"}, {"choice": ["a", "b"]}, {"json": _SCHEMA}),
    "guided_regex": ("[0-9]{2}",),
    "guided_choice": (["a", "b"],),
    "guided_json": (_SCHEMA,),
    "request_id": ("mine",),
    "session_id": ("session-1", "session-2"),
    "previous_response_id": ("resp_none",),
    "include": (["message.output_text.logprobs"],),
    "system": ("Be brief.", [{"type": "text", "text": "Be brief."}]),
}
_MOST_REPEATED = 4_000_000
"""Bytes that a repeated part may have as JSON: more than any endpoint takes. Repeats of repeats would have any size."""
_REQUIRED = ("messages", "prompt", "input", "tokens", "max_tokens")


def structured_body(path: str, rng: random.Random) -> bytes:
    """Return a body for an endpoint; equal generators give equal ones."""
    request, wildness = ENDPOINTS[path], rng.choice(_WILDNESS)
    density = rng.choice((0.05, 0.15, 0.5))
    body: dict[str, Any] = {}
    names = sorted({*request.model_fields, *request.refused, *request.ignored})
    rng.shuffle(names)
    for name in names:
        is_required = name in _REQUIRED and rng.random() > wildness / 4
        is_known = name in request.model_fields or rng.random() < wildness
        if is_required or (is_known and rng.random() < density):
            body[name] = _value(name, rng, wildness)
    if rng.random() < wildness:
        body[rng.choice(_TEXTS)] = _odd(rng, 0)
    return _damaged(json.dumps(body).encode(), rng, wildness)


def _value(name: str, rng: random.Random, wildness: float) -> Any:
    if rng.random() < wildness:
        return _odd(rng, 0)
    value = rng.choice(_PLAUSIBLE.get(name, (True, False, None, 1, 0.5, "a")))
    return _twisted(value, rng, wildness / 4)


def _twisted(value: Any, rng: random.Random, wildness: float, repeats: int = 1000) -> Any:
    """Return a value with some of its parts replaced or repeated."""
    if rng.random() < wildness:
        return _odd(rng, 0)
    if isinstance(value, list):
        times = rng.choice((0, 2, repeats)) if rng.random() < wildness else 1
        return _repeated([_twisted(item, rng, wildness, 2) for item in value], times)
    if isinstance(value, dict):
        return {name: _twisted(item, rng, wildness, 2) for name, item in value.items()}
    return value


def _repeated(items: list[Any], times: int) -> list[Any]:
    """Repeat a list's items so many times, or fewer where they are long."""
    return items * min(times, max(1, _MOST_REPEATED // len(json.dumps(items))))


def _odd(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8)
    if kind < 2:
        return rng.choice(_NUMBERS)
    if kind < 4:
        return rng.choice(_TEXTS)
    if kind == 4:
        return rng.choice((None, True, False, [], {}, "", 0))
    if depth > 3 or kind == 5:
        return _nested(rng.choice((3, 30, 300)), rng.choice(([], {})))
    if kind == 6:
        times = rng.choice((1, 3) if depth else (1, 3, 500))
        return _repeated([_odd(rng, depth + 1 if depth else 3)], times)
    return {rng.choice(_TEXTS): _odd(rng, depth + 1) for _ in range(rng.choice((1, 4)))}


def _nested(depth: int, kind: Any) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"type": value} if isinstance(kind, dict) else [value]
    return value


def _damaged(data: bytes, rng: random.Random, wildness: float) -> bytes:
    if rng.random() > wildness / 4:
        return data
    place = rng.randrange(len(data) + 1)
    damages: tuple[Callable[[], bytes], ...] = (
        lambda: data[:place],
        lambda: data[:place] + bytes([rng.randrange(256)]) + data[place:],
        lambda: data[:-1] + b"," + data[1:],  # each key twice
        lambda: data[:-1] + b',"x":' + rng.choice((b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"[" * 10_000)) + b"}",
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode(errors="replace").encode("utf-16"),
        lambda: data + b" " * 100_000,
    )
    return rng.choice(damages)()
