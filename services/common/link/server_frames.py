"""Parsing and checks of the frames that a client receives on a link."""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError

from scalellm.services.common.errors import LONGEST_MESSAGE, StatusError
from scalellm.services.common.link.client_frames import LONGEST_NS
from scalellm.services.common.link.version import check_api_minor
from scalellm.v1 import common_pb2, link_pb2

_CODES = frozenset(code.value[0] for code in grpc.StatusCode)
_REASONS = frozenset(common_pb2.FinishReason.values()) - {common_pb2.FINISH_REASON_UNSPECIFIED}
_DURATIONS = tuple(field.name for field in link_pb2.HopTimings.DESCRIPTOR.fields if field.name.endswith("_ns"))
_SIZES = ("block_size", "num_blocks", "max_num_seqs", "vocab_size")
_LONGEST_NAME = 1024


def read_welcome(message: bytes) -> link_pb2.Welcome:
    """Parse the first frame of a link. Raises StatusError if it is not a Welcome of a model that can be served, or the
    peer's version is too old.
    """
    frame = _parse(message)
    if frame.WhichOneof("frame") != "welcome":
        raise _malformed("the first one must be a Welcome")
    welcome = frame.welcome
    check_api_minor("Welcome.api_minor", welcome.api_minor)
    for name in ("instance_id", "model", "tokenizer_sha256"):
        if len(getattr(welcome, name)) > _LONGEST_NAME:
            raise _malformed(f"Welcome.{name}: must have at most {_LONGEST_NAME} characters")
    for name in _SIZES:
        if not getattr(welcome, name):
            raise _malformed(f"Welcome.{name}: must be at least 1, got 0")
    if welcome.max_model_len < 2:
        raise _malformed(f"Welcome.max_model_len: must be at least 2, got {welcome.max_model_len}")
    if welcome.lease_ns > LONGEST_NS:
        raise _malformed(f"Welcome.lease_ns: must be at most {LONGEST_NS}, got {welcome.lease_ns}")
    return welcome


def read_step(message: bytes, vocab_size: int) -> link_pb2.StepOutput:
    """Parse a later frame. Raises StatusError if its columns do not match, or a value is invalid. Checks that depend on
    the requests (handles, offsets of tokens) are the caller's.

    Args:
        message: The message.
        vocab_size: The `vocab_size` of the link's Welcome.
    """
    frame = _parse(message)
    if frame.WhichOneof("frame") != "step":
        raise _malformed("those after the first one must be steps")
    step = frame.step
    length = len(step.handles)
    if not length == len(step.indices) == len(step.offsets) == len(step.counts):
        raise _malformed(f"step {step.seq}: handles, indices, offsets and counts differ in length")
    token_ids = step.token_ids
    if sum(step.counts) != len(token_ids):
        raise _malformed(f"step {step.seq}: the number of token_ids is not the sum of counts")
    if token_ids and max(token_ids) >= vocab_size:
        raise _malformed(f"step {step.seq}: token_ids must be below the vocabulary size {vocab_size}")
    for entries in (step.logprobs, step.prompt_logprobs):
        for entry in entries:
            _check_logprobs(entry.values)
    for sample in step.finished_samples:
        if sample.reason not in _REASONS:
            raise _malformed(f"finished_samples.reason: must be a value of FinishReason, got {sample.reason}")
    for finish in step.finished:
        _check_finish(finish)
    return step


def _parse(message: bytes) -> link_pb2.ServerFrame:
    try:
        return link_pb2.ServerFrame.FromString(message)
    except DecodeError:
        raise _malformed(f"{len(message)} bytes that are not a ServerFrame") from None


def _check_logprobs(values: common_pb2.TokenLogprobs) -> None:
    if not len(values.top_token_ids) == len(values.top_logprobs) == len(values.logprobs) * values.num_top:
        raise _malformed("logprobs: top_token_ids and top_logprobs must have num_top entries per token")


def _check_finish(finish: link_pb2.Finish) -> None:
    status, timings = finish.status, finish.timings
    if status.code not in _CODES:
        raise _malformed(f"finished.status.code: must be a google.rpc.Code, got {status.code}")
    if len(status.message) > LONGEST_MESSAGE:
        raise _malformed(f"finished.status.message: must have at most {LONGEST_MESSAGE} characters")
    if len(status.field) > _LONGEST_NAME:
        raise _malformed(f"finished.status.field: must have at most {_LONGEST_NAME} characters")
    if status.retry_after_ns > LONGEST_NS:
        raise _malformed(f"finished.status.retry_after_ns: must be at most {LONGEST_NS}, got {status.retry_after_ns}")
    if finish.tenant_full_ns > LONGEST_NS:
        raise _malformed(f"finished.tenant_full_ns: must be at most {LONGEST_NS}, got {finish.tenant_full_ns}")
    for name in _DURATIONS:
        if getattr(timings, name) > LONGEST_NS:
            raise _malformed(f"finished.timings.{name}: must be at most {LONGEST_NS}, got {getattr(timings, name)}")
    if len(timings.executor_id) > _LONGEST_NAME:
        raise _malformed(f"finished.timings.executor_id: must have at most {_LONGEST_NAME} characters")


def _malformed(problem: str) -> StatusError:
    return StatusError(grpc.StatusCode.INTERNAL, f"malformed frame: {problem}")
