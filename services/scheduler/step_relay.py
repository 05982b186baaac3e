"""Passes one executor step on to the client links it concerns: the per-token path of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping

from scalellm.v1 import common_pb2, link_pb2
from services.scheduler.books import Books
from services.scheduler.request import Request


def relay_step(step: link_pb2.StepOutput, running: Mapping[int, Request], books: Books) -> list[tuple[Request, str]]:
    """Pass tokens, log-probabilities and sample ends on, each exactly once.

    Tokens that the client already has are dropped, which makes resubmission idempotent. Entries of unknown handles
    belong to requests that ended here before the executor knew. Finishes are left to the caller.

    Args:
        step: A frame of one executor; changed.
        running: The requests on that executor, by the handles used there.
        books: Count the tokens.

    Returns:
        Requests whose entries contradict the protocol, with what is wrong.
    """
    # Lists: protobuf's own columns make an object per access, which costs more than all the rest of the loop.
    handles, indices, offsets, counts = step.handles[:], step.indices[:], step.offsets[:], step.counts[:]
    token_ids = step.token_ids[:]
    books.tokens_received += len(token_ids)
    broken: list[tuple[Request, str]] = []
    if not _relay_decodes(handles, indices, offsets, counts, token_ids, running):
        books.tokens_dropped += _relay_tokens(handles, indices, offsets, counts, token_ids, running, broken)
    for logprobs in step.logprobs:
        if (request := running.get(logprobs.handle)) is not None:
            _relay_logprobs(logprobs, request, broken)
    for logprobs in step.prompt_logprobs:
        if (request := running.get(logprobs.handle)) is not None:
            _relay_prompt_logprobs(logprobs, request, broken)
    for sample in step.finished_samples:
        if (request := running.get(sample.handle)) is None or sample.index in request.ended_samples:
            continue
        if sample.index >= len(request.emitted):
            broken.append((request, f"sample {sample.index} ended, which there is not"))
        else:
            request.ended_samples[sample.index] = sample.reason
            request.stopping_samples.pop(sample.index, None)
            sample.handle = request.handle
            request.link.add_sample_finish(sample)
    return broken


def _relay_decodes(
    handles: list[int],
    indices: list[int],
    offsets: list[int],
    counts: list[int],
    token_ids: list[int],
    running: Mapping[int, Request],
) -> bool:
    """Pass on the one frame that matters for speed: each request's next token, all for one client link.

    Returns False, with nothing done, when the frame is another one.
    """
    if not len(token_ids) == len(handles) == len({*handles}) or any(indices):
        return False
    requests = [request for handle in handles if (request := running.get(handle)) is not None]
    links = {request.link for request in requests}
    if len(requests) != len(handles) or len(links) != 1 or len({*counts}) != 1:
        return False
    samples = [request.emitted[0] for request in requests]
    if [*map(len, samples)] != offsets:
        return False
    for tokens, token in zip(samples, token_ids, strict=True):
        tokens.append(token)
    links.pop().add_columns([request.handle for request in requests], indices, offsets, counts, token_ids)
    return True


def _relay_tokens(
    handles: list[int],
    indices: list[int],
    offsets: list[int],
    counts: list[int],
    token_ids: list[int],
    running: Mapping[int, Request],
    broken: list[tuple[Request, str]],
) -> int:
    """Pass on whatever tokens there are. Returns how many nobody was to see; adds to `broken`."""
    start = num_dropped = 0
    for handle, index, offset, count in zip(handles, indices, offsets, counts, strict=True):
        stop = start + count
        request = running.get(handle)
        if request is not None:
            emitted = request.emitted
            if index < len(emitted) and offset <= (known := len(tokens := emitted[index])):
                new = token_ids[start + known - offset : stop]
                if known != offset:
                    num_dropped += min(known - offset, count)
                if new:
                    tokens += new
                    request.link.add_tokens(request.handle, index, known, new)
            else:
                num_dropped += count
                broken.append((request, f"tokens of sample {index} at offset {offset} do not follow the last ones"))
        else:
            num_dropped += count
        start = stop
    return num_dropped


def _relay_logprobs(logprobs: link_pb2.LinkLogprobs, request: Request, broken: list[tuple[Request, str]]) -> None:
    known = request.logprobs_passed.get(logprobs.index, 0)
    end = logprobs.offset + len(logprobs.values.logprobs)
    if logprobs.index >= len(request.emitted) or logprobs.offset > known:
        where = f"of sample {logprobs.index} at offset {logprobs.offset}"
        broken.append((request, f"log-probabilities {where} do not follow the last ones"))
    elif end > known:
        _skip(logprobs, known)
        request.logprobs_passed[logprobs.index] = end
        logprobs.handle = request.handle
        request.link.add_logprobs(logprobs)


def _relay_prompt_logprobs(
    logprobs: link_pb2.LinkLogprobs, request: Request, broken: list[tuple[Request, str]]
) -> None:
    end = logprobs.offset + len(logprobs.values.logprobs)
    if logprobs.offset > request.prompt_logprobs_passed or end > request.num_prompt_tokens:
        broken.append((request, f"log-probabilities of the prompt at offset {logprobs.offset} are not the next ones"))
    elif end > request.prompt_logprobs_passed:
        _skip(logprobs, request.prompt_logprobs_passed)
        request.prompt_logprobs_passed = end
        logprobs.handle = request.handle
        request.link.add_prompt_logprobs(logprobs)


def _skip(logprobs: link_pb2.LinkLogprobs, offset: int) -> None:
    """Drop the values before `offset`."""
    count = offset - logprobs.offset
    if count <= 0:
        return
    values: common_pb2.TokenLogprobs = logprobs.values
    del values.logprobs[:count]
    del values.top_token_ids[: count * values.num_top]
    del values.top_logprobs[: count * values.num_top]
    logprobs.offset = offset
