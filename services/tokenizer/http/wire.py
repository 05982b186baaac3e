"""Parts of JSON documents that are written without making objects of them, and small ones that all APIs share."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from types import MappingProxyType

from scalellm.v1 import common_pb2, generation_pb2

quote = encode_basestring
"""Convert a text to a JSON string, in C. Characters beyond ASCII are not escaped."""

DONE = "data: [DONE]\n\n"
"""The last event of OpenAI's streams."""

_REASONS: Mapping[int, str] = MappingProxyType(
    {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}
)

_SESSION_OUTCOMES: Mapping[int, str] = MappingProxyType(
    {
        generation_pb2.SESSION_OUTCOME_SAVED: "saved",
        generation_pb2.SESSION_OUTCOME_CONFLICT: "conflict",
        generation_pb2.SESSION_OUTCOME_UNAVAILABLE: "unavailable",
        generation_pb2.SESSION_OUTCOME_FULL: "full",
    }
)

_LATENCY_PARTS = ("session", "tokenize", "admission", "queue", "prefill", "decode", "failover", "detokenize", "network")


def dump(value: object) -> str:
    """Return a value as JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def answer_head(kind: str, answer_id: str, model: str) -> str:
    """Return an answer of chats and completions up to its first choice. `kind` is OpenAI's name of such an answer."""
    head = f'{{"id":{quote(answer_id)},"object":"{kind}","created":{int(time.time())}'
    return f'{head},"model":{quote(model)},"choices":['


def finish_reason(sample: generation_pb2.SampleFinished) -> str:
    """Return the finish reason of a sample in OpenAI's words."""
    if sample.num_tool_calls and sample.reason == common_pb2.FINISH_REASON_STOP:
        return "tool_calls"
    return _REASONS.get(sample.reason, "stop")


def stop_reason(sample: generation_pb2.SampleFinished) -> str | int | None:
    """Return the cause of a sample's end: the stop text, or the token where it was asked for; vLLM's field."""
    match sample.WhichOneof("matched"):
        case "stop":
            return sample.stop
        case "stop_token_id":
            return sample.stop_token_id
    return None


def total_usage(finished: Sequence[generation_pb2.Finished]) -> common_pb2.Usage:
    """Add up what generations consumed."""
    total = common_pb2.Usage()
    for one in finished:
        total.prompt_tokens += one.usage.prompt_tokens
        total.completion_tokens += one.usage.completion_tokens
        total.cached_tokens += one.usage.cached_tokens
        total.accepted_prediction_tokens += one.usage.accepted_prediction_tokens
        total.rejected_prediction_tokens += one.usage.rejected_prediction_tokens
    return total


def usage_json(prompt_tokens: int, completion_tokens: int, details: str = "") -> str:
    """Return OpenAI's `usage`, with additional members `details`, each after a comma."""
    return (
        f'{{"prompt_tokens":{prompt_tokens},"completion_tokens":{completion_tokens},'
        f'"total_tokens":{prompt_tokens + completion_tokens}{details}}}'
    )


def final_usage_json(usage: common_pb2.Usage) -> str:
    """Return OpenAI's `usage` of a finished answer, with those details of its tokens that are known."""
    details = f',"prompt_tokens_details":{{"cached_tokens":{usage.cached_tokens}}}'
    told = {}
    if usage.HasField("reasoning_tokens"):
        told["reasoning_tokens"] = usage.reasoning_tokens
    if usage.accepted_prediction_tokens or usage.rejected_prediction_tokens:
        told["accepted_prediction_tokens"] = usage.accepted_prediction_tokens
        told["rejected_prediction_tokens"] = usage.rejected_prediction_tokens
    if told:
        details += f',"completion_tokens_details":{dump(told)}'
    return usage_json(usage.prompt_tokens, usage.completion_tokens, details)


def latency_json(finished: Sequence[generation_pb2.Finished]) -> str:
    """Return the latency breakdown of the longest generation, in milliseconds."""
    latency = max((one.latency for one in finished), key=lambda latency: latency.total_ns)
    parts = {name: getattr(latency, f"{name}_ns") for name in ("total", "ttft", *_LATENCY_PARTS)}
    shown: dict[str, object] = {f"{name}_ms": round(value / 1e6, 3) for name, value in parts.items() if value}
    if latency.executor_id:
        shown["executor"] = latency.executor_id
    return dump(shown)


def session_json(finished: generation_pb2.Finished) -> str:
    """Return the field with the outcome of a session's turn, with a comma before it; empty without a session."""
    outcome = _SESSION_OUTCOMES.get(finished.session)
    return f',"session":"{outcome}"' if outcome else ""
