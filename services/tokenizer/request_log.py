"""One log line per request at its end, with its outcome and, unless configured, without its text."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.logs import LineLimit
from scalellm.services.tokenizer.config import TokenizerSettings
from scalellm.v1 import common_pb2, generation_pb2

_log = logging.getLogger("scalellm.services.tokenizer.requests")

_OURS = frozenset(
    {
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    }
)
"""Statuses of interest to the operator, which the client did not cause by a mistake, a cancellation or a limit."""

_LONGEST_PROMPT = 4096
"""Characters of a prompt in a log line."""


@dataclass(slots=True)
class RequestEnd:
    """The end of a request.

    Attributes:
        request: The client's request.
        error: Its status; None = OK.
        latency: Its latency breakdown, as far as that is known.
        usage: Its usage; None = not known.
    """

    request: generation_pb2.GenerateRequest
    error: StatusError | None
    latency: common_pb2.LatencyBreakdown
    usage: common_pb2.Usage | None

    @property
    def code(self) -> grpc.StatusCode:
        """The status that the client gets."""
        return self.error.code if self.error is not None else grpc.StatusCode.OK


class RequestLog:
    """Writes the lines. Failures that are the service's own are always written, a few per second at most.

    Args:
        settings: Further contents of the log: all requests, and their prompts.
    """

    def __init__(self, settings: TokenizerSettings) -> None:
        self._all = settings.log_requests
        self._prompts = settings.log_prompts
        self._limit = LineLimit()

    def wants(self, error: StatusError | None) -> bool:
        """True if a request that ended with this status may be logged."""
        return self._all or (error is not None and error.code in _OURS)

    def write(self, end: RequestEnd) -> None:
        """Log the end of a request for which `wants` is true."""
        held_back = 0 if self._all else self._limit.admit()
        if held_back is None:
            return
        latency, usage = end.latency, end.usage
        values: dict[str, object] = {"code": end.code.name, "e2e_ms": _ms(latency.total_ns)}
        if usage is not None:
            values |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        if latency.ttft_ns:
            values["ttft_ms"] = _ms(latency.ttft_ns)
        if latency.executor_id:
            values["executor"] = latency.executor_id
        if held_back:
            values["not_logged"] = held_back
        if end.error is not None:
            # Only the field of a client's mistake is logged, because the message may quote the request.
            mistake = end.code is grpc.StatusCode.INVALID_ARGUMENT
            values["field" if mistake else "error"] = end.error.field if mistake else end.error.message
        if self._prompts:
            values["prompt"] = _prompt(end.request)
        text = ", ".join(f"{name} {value}" for name, value in values.items() if name != "code")
        level = logging.WARNING if end.code in _OURS else logging.INFO
        _log.log(level, "request ended %s: %s", end.code.name, text, extra=values)


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def _prompt(request: generation_pb2.GenerateRequest) -> str:
    match request.WhichOneof("input"):
        case "chat":
            text = json.dumps([{"role": message.role, "content": message.content} for message in request.chat.messages])
        case "tokens":
            text = json.dumps(request.tokens.ids[: _LONGEST_PROMPT // 2])
        case _:
            text = json.dumps(request.prompt[:_LONGEST_PROMPT])
    return text if len(text) <= _LONGEST_PROMPT else f"{text[:_LONGEST_PROMPT]}..."
