"""Parsing and checks of the frames that a server receives on a link.

The frames of both links are read here, so that a field has the same meaning and limits on each. Values that only an
engine can check (token ids, sampling) are checked there, with errors that name fields in the same way.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from scalellm.services.common.errors import StatusError
from scalellm.services.common.field_rules import MAX_PREDICTION
from scalellm.services.common.link.version import check_api_minor
from scalellm.services.common.tracing.headers import LONGEST_STATE, TraceHeaders
from scalellm.v1 import common_pb2, link_pb2

MAX_SAMPLES = 16
"""Most samples of one request."""

LONGEST_NS = 10**18
"""Longest duration on a link, in nanoseconds (some thirty years). Sums of a few, or of one and a time, fit into 64
bits."""

LOWEST_PRIORITY = -100
"""Priority of the most urgent requests."""

_PRIORITIES = (LOWEST_PRIORITY, 100)
_WEIGHTS = (0.01, 100.0)
_LONGEST_HELLO = 2**14
_LONGEST_ID = 256
_LONGEST_SALT = 64
_LONGEST_DIGEST = 64
_LONGEST_MODEL = 1024
_LONGEST_GRAMMAR = 2**19
_EXECUTION_ID = 16


def parse_client_frame(message: bytes) -> link_pb2.ClientFrame:
    """Parse a frame. Raises StatusError, which ends the link, if it is malformed."""
    try:
        return link_pb2.ClientFrame.FromString(message)
    except DecodeError:
        raise StatusError.invalid("frame", f"{len(message)} bytes that are not a ClientFrame") from None


def read_hello(message: bytes) -> link_pb2.Hello:
    """Parse the first frame of a link. Raises StatusError, which ends the link, if it is not a valid Hello, or the
    client's version is too old.
    """
    _check_size("hello", message, _LONGEST_HELLO)
    frame = parse_client_frame(message)
    if frame.WhichOneof("frame") != "hello":
        raise StatusError.invalid("hello", "must be the first frame of a link")
    check_api_minor("hello.api_minor", frame.hello.api_minor)
    _check_size("hello.client_id", frame.hello.client_id, _LONGEST_ID)
    _check_size("hello.tokenizer_sha256", frame.hello.tokenizer_sha256, _LONGEST_DIGEST)
    _check_size("hello.model", frame.hello.model, _LONGEST_MODEL)
    _check_size("hello.service", frame.hello.service, _LONGEST_ID)
    return frame.hello


def tenant_weight(submit: link_pb2.Submit) -> float:
    """Return the weight of the request's tenant; 1 if it is not set, or is one that check_submit refuses."""
    weight: float = submit.tenant_weight
    return weight if submit.HasField("tenant_weight") and _is_weight(weight) else 1.0


def check_submit(submit: link_pb2.Submit) -> None:
    """Raise StatusError INVALID_ARGUMENT, which ends only this request, for the first field beyond its limits."""
    num_tokens = len(submit.token_ids)
    if not num_tokens:
        raise StatusError.invalid("token_ids", "the prompt is empty, at least one token is needed")
    _check_size("request_id", submit.request_id, _LONGEST_ID)
    _check_size("session_id", submit.session_id, _LONGEST_ID)
    _check_size("cache_salt", submit.cache_salt, _LONGEST_SALT)
    _check_size("tenant", submit.tenant, _LONGEST_SALT)
    _check_size("grammar", submit.grammar, _LONGEST_GRAMMAR)
    if len(submit.prediction_token_ids) > MAX_PREDICTION:
        got = len(submit.prediction_token_ids)
        raise StatusError.invalid("prediction_token_ids", f"must have at most {MAX_PREDICTION} entries, got {got}")
    if len(submit.execution_id) not in (0, _EXECUTION_ID):
        raise StatusError.invalid("execution_id", f"must have {_EXECUTION_ID} bytes, got {len(submit.execution_id)}")
    lowest, highest = _PRIORITIES
    if not lowest <= submit.priority <= highest:
        raise StatusError.invalid("priority", f"must be in [{lowest}, {highest}], got {submit.priority}")
    if submit.HasField("tenant_weight") and not _is_weight(submit.tenant_weight):
        lightest, heaviest = _WEIGHTS
        message = f"must be in [{lightest:g}, {heaviest:g}], got {submit.tenant_weight:g}"
        raise StatusError.invalid("tenant_weight", message)
    if submit.time_remaining_ns > LONGEST_NS:
        raise StatusError.invalid("time_remaining_ns", f"must be at most {LONGEST_NS}, got {submit.time_remaining_ns}")
    if submit.charged_tokens > num_tokens:
        raise StatusError.invalid(
            "charged_tokens", f"must be at most the prompt's {num_tokens} tokens, got {submit.charged_tokens}"
        )
    if not TraceHeaders(submit.traceparent).is_well_formed:
        raise StatusError.invalid("traceparent", "must be empty or a traceparent of W3C Trace Context")
    if not TraceHeaders(tracestate=submit.tracestate).is_well_formed:
        raise StatusError.invalid("tracestate", f"must have at most {LONGEST_STATE} characters of ASCII")
    num_samples = submit.sampling.n if submit.sampling.HasField("n") else 1
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise StatusError.invalid("sampling.n", f"{num_samples} is not within 1..{MAX_SAMPLES}")
    _check_resumed(submit, num_samples)


def _check_resumed(submit: link_pb2.Submit, num_samples: int) -> None:
    seen: set[int] = set()
    for sample in submit.resumed:
        if sample.index >= num_samples or sample.index in seen:
            message = f"{sample.index} is not below sampling.n = {num_samples}, or comes twice"
            raise StatusError.invalid("resumed.index", message)
        if sample.finished not in common_pb2.FinishReason.values():
            raise StatusError.invalid("resumed.finished", f"must be a value of FinishReason, got {sample.finished}")
        num_tokens = len(sample.token_ids)
        if submit.sampling.HasField("max_tokens") and num_tokens > submit.sampling.max_tokens:
            message = f"sample {sample.index} has {num_tokens}, sampling.max_tokens allows {submit.sampling.max_tokens}"
            raise StatusError.invalid("resumed.token_ids", message)
        seen.add(sample.index)


def _is_weight(weight: float) -> bool:
    lightest, heaviest = _WEIGHTS
    return lightest <= weight <= heaviest


def _check_size(field: str, value: str | bytes, limit: int) -> None:
    size = len(value.encode()) if isinstance(value, str) else len(value)
    if size > limit:
        raise StatusError.invalid(field, f"must have at most {limit} bytes, got {size}")
