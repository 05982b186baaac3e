"""The tokens of a StepOutput: columns on the wire, runs of consecutive tokens of one sample in the programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scalellm.v1 import link_pb2

TokenRun = tuple[int, int, int, list[int]]
"""A request's handle, the sample's index, tokens of it before these, and the tokens."""


def token_runs(step: link_pb2.StepOutput) -> Iterable[TokenRun]:
    """Return the tokens of a step whose columns agree, as `read_step` makes sure, in their order.

    One token per run is the frame that matters for speed. Lists: protobuf's own columns make an object per access.
    """
    counts, token_ids = step.counts[:], step.token_ids[:]
    if len(counts) == len(token_ids) and 0 not in counts:
        parts = [[token_id] for token_id in token_ids]
    else:
        parts, start = [], 0
        for count in counts:
            parts.append(token_ids[start : start + count])
            start += count
    return zip(step.handles[:], step.indices[:], step.offsets[:], parts, strict=True)


def add_tokens(step: link_pb2.StepOutput, handle: int, index: int, offset: int, token_ids: Sequence[int]) -> None:
    """Add a run to a step."""
    step.handles.append(handle)
    step.indices.append(index)
    step.offsets.append(offset)
    step.counts.append(len(token_ids))
    step.token_ids.extend(token_ids)
