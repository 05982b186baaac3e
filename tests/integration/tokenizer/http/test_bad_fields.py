"""Every field of every endpoint with a value that it cannot have: 400, its name, and the scheduler sees none of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service_processes import eventually
from structured_json import ENDPOINTS

HELLO = [{"role": "user", "content": "Hi"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": HELLO, "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "n": (0, 17),
    "best_of": (0, 2),
    "max_tokens": (0, 2**20),
    "max_completion_tokens": (0, 2**20),
    "max_output_tokens": (0, 2**20),
    "min_tokens": (3, 2**20),
    "temperature": (-0.1, 100.1, 1e300),
    "top_p": (0, -0.1, 1.1),
    "min_p": (-0.1, 1.1),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, 2.1),
    "top_k": (-2,),
    "logprobs": (21,),
    "prompt_logprobs": (21,),
    "logit_bias": ({"49152": 1}, {"1": 101}, {"-1": 1}, {"a": 1}, {str(token): 1 for token in range(1025)}),
    "seed": (2**64, -(2**63) - 1),
    "stop": ([""], ["a"] * 17, ["a" * 257], "\ud800", ["a", 5]),
    "stop_sequences": ([""], ["a"] * 17, ["\ud800"]),
    "stop_token_ids": ([49152], [1] * 65),
    "priority": (-101, 101),
    "request_id": ("", "a b", "a" * 129),
    "session_id": ("", "a b", "a" * 129),
    "cache_salt": ("", "a" * 129, "\ud800"),
    "stream_interval": (0, 1025),
    "messages": ([], [{}], [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "a " * 5000}]),
    "prompt": ("", [], [[]], [-1], [49152], "a " * 5000, "\ud800", [True], ["a"] * 257),
    "input": ([], [{"type": "reasoning"}], "\ud800", "a " * 5000),
    "tokens": ([-1], [49152], [2**32], [True]),
    "chat_template_kwargs": ({"tools": 1}, {"a": "a" * 2**14}, {"a": "\ud800"}),
    "reasoning_effort": ("a" * 2**14, "\ud800"),
    "instructions": ("\ud800",),
    "previous_response_id": (),
    "model": (),
}
NO_LIMIT: dict[str, tuple[str, ...]] = {
    "/tokenize": ("prompt", "messages"),
    "/v1/messages/count_tokens": ("messages", "max_tokens", "temperature", "top_p", "top_k", "stop_sequences"),
}
"""Fields of endpoints that generate nothing: what they would mean for an answer is not looked at."""
WRONG_TYPES: dict[str, tuple[Any, ...]] = {
    "str": (5, []),
    "int": ("5", 1.5, True),
    "float": ("5", True),
    "bool": ("true", 1),
    "list": ("a", {}),
    "dict": ("a", []),
    "Any": (5, 0.5),
}


def wrong_types(path: str, name: str) -> tuple[Any, ...]:
    said = str(ENDPOINTS[path].model_fields[name].annotation).removeprefix("<class '").replace("typing.", "")
    found = next(
        (kind for kind in ("Any", "list", "dict", "bool", "float", "int", "str") if said.startswith(kind)), "dict"
    )
    if found == "Any" and said != "Any":
        found = "list"
    return WRONG_TYPES[found]


@pytest.mark.parametrize("path", GOOD)
async def test_each_field_names_what_is_wrong_with_it(http, scheduler, path):
    missed = []
    for name in ENDPOINTS[path].model_fields:
        odd = () if name in NO_LIMIT.get(path, ()) else OUT_OF_RANGE.get(name, ())
        for value in (*wrong_types(path, name), *odd):
            beside = {"messages": HELLO} if path == "/tokenize" and name != "prompt" else GOOD[path]
            body = {**beside, name: value}
            reply = await http.post(path, json.dumps(body).encode())
            error = reply.json.get("error") or {}
            message = error.get("message", "")
            # Anthropic's errors have no field of their own for it.
            param = error.get("param") or message.partition(": ")[0]
            is_named = param == name or param.startswith((f"{name}[", f"{name}."))
            if reply.status != 400 or not is_named or not message.startswith(f"{param}: ") or len(message) > 600:
                missed.append((name, str(value)[:60], reply.status, param, message[:200]))
    assert not missed, "\n".join(map(str, missed))
    assert scheduler.submits == []
    assert (await http.post(path, GOOD[path])).status == 200
    await eventually(lambda: scheduler.num_running == 0)


BODIES = {
    "broken JSON": b"{",
    "two documents": b"{}{}",
    "no object": b"[1]",
    "nothing": b"",
    "deep JSON": b'{"a": ' + b"[" * 10**5,
    "deep objects": b'{"a": ' * 10**5,
    "keys that come twice": b'{"a": 1, "a": 2}',
    "keys that come twice, deep": b'{"a": [{"b": 1, "b": 1}]}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "broken UTF-8": b'{"model": "\xc3\x28"}',
    "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "an endless number": b'{"seed": ' + b"1" * 10**5 + b"}",
    "many objects": b'{"a": [' + b",".join([b"{}"] * 10**5) + b"]}",
}


@pytest.mark.parametrize("path", GOOD)
async def test_each_body_that_is_none_is_refused(http, scheduler, path):
    for name, body in BODIES.items():
        reply = await http.post(path, body)
        error = reply.json["error"]
        assert (reply.status, error["message"].partition(": ")[0]) == (400, "body"), name
        assert len(error["message"]) < 400, name
    for status, body, headers in (
        (413, b" " * 4_000_000, {}),
        (415, b"{}", {"content_type": "text/plain"}),
        (415, b"{}", {"content_encoding": "gzip"}),
    ):
        assert (await http.post(path, body, **headers)).status == status
    assert scheduler.submits == []
    assert (await http.get("/health")).status == 200
