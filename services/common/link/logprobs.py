"""Slices of log-probabilities, which are columns, some with an entry per token, some per token and alternative."""

from __future__ import annotations

from scalellm.v1 import common_pb2, link_pb2


def cut_logprobs(values: common_pb2.TokenLogprobs, start: int, stop: int) -> common_pb2.TokenLogprobs:
    """Return the entries of the tokens `[start, stop)`; for all tokens, the same object."""
    if start == 0 and stop >= len(values.logprobs):
        return values
    return copy_logprobs(values, start, stop)


def copy_logprobs(values: common_pb2.TokenLogprobs, start: int, stop: int) -> common_pb2.TokenLogprobs:
    """Return a copy of the entries of the tokens `[start, stop)`, independent of later changes to `values`."""
    top = slice(start * values.num_top, stop * values.num_top)
    return common_pb2.TokenLogprobs(
        logprobs=values.logprobs[start:stop],
        num_top=values.num_top,
        top_token_ids=values.top_token_ids[top],
        top_logprobs=values.top_logprobs[top],
    )


def skip_logprobs(entry: link_pb2.LinkLogprobs, offset: int) -> None:
    """Drop the values of tokens before `offset`. Does nothing if the entry begins later."""
    count = offset - entry.offset
    if count > 0:
        entry.values.CopyFrom(cut_logprobs(entry.values, count, len(entry.values.logprobs)))
        entry.offset = offset
