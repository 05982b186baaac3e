"""The tokens of a StepOutput: columns on the wire, runs of consecutive tokens of one sample in the programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scalellm.v1 import link_pb2

TokenRun = tuple[int, int, int, list[int]]
"""Handle of the request, index of the sample, number of its tokens before these, and the tokens."""


def token_runs(step: link_pb2.StepOutput) -> Iterable[TokenRun]:
    """Return the token runs of a step in order. The columns must have equal lengths, which `read_step` has checked.

    A frame with one token per run is the most frequent one, and has a fast path. Columns are converted to lists,
    because each access to a protobuf column makes an object.
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
