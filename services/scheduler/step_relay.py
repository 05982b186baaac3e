"""Passes one executor step on to the client links it concerns: the per-token path of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping

from scalellm.v1 import common_pb2, link_pb2
from services.scheduler.books import Books
from services.scheduler.client_side import ClientSide


def relay_step(step: link_pb2.StepOutput, running: Mapping[int, ClientSide], books: Books) -> list[tuple[int, str]]:
    """Pass tokens, log-probabilities and sample ends on, each exactly once.

    Tokens that the client already has are dropped, which makes resubmission idempotent. Entries of unknown handles
    belong to requests that ended here before the executor knew. Finishes are left to the caller.

    Args:
        step: A frame of one executor; changed.
        running: The clients of the requests on that executor, by the handles used there.
        books: Count the tokens.

    Returns:
        The executor's handles of requests whose entries contradict the protocol, with what is wrong.
    """
    # Lists: protobuf's own columns make an object per access, which costs more than all the rest of the loop.
    handles, indices, offsets, counts = step.handles[:], step.indices[:], step.offsets[:], step.counts[:]
    token_ids = step.token_ids[:]
    books.tokens_received += len(token_ids)
    broken: list[tuple[int, str]] = []
    if not _relay_decodes(handles, indices, offsets, counts, token_ids, running):
        books.tokens_dropped += _relay_tokens(handles, indices, offsets, counts, token_ids, running, broken)
    for logprobs in step.logprobs:
        if (client := running.get(logprobs.handle)) is not None:
            _relay_logprobs(logprobs, client, broken)
    for logprobs in step.prompt_logprobs:
        if (client := running.get(logprobs.handle)) is not None:
            _relay_prompt_logprobs(logprobs, client, broken)
    for sample in step.finished_samples:
        if (client := running.get(sample.handle)) is None or sample.index in client.ended_samples:
            continue
        if sample.index >= len(client.emitted):
            broken.append((sample.handle, f"sample {sample.index} ended, which there is not"))
        else:
            client.ended_samples[sample.index] = sample.reason
            client.stopping_samples.pop(sample.index, None)
            sample.handle = client.handle
            client.link.add_sample_finish(sample)
    return broken


def _relay_decodes(
    handles: list[int],
    indices: list[int],
    offsets: list[int],
    counts: list[int],
    token_ids: list[int],
    running: Mapping[int, ClientSide],
) -> bool:
    """Pass on the one frame that matters for speed: each request's next token, all for one client link.

    Returns False, with nothing done, when the frame is another one.
    """
    if not len(token_ids) == len(handles) == len({*handles}) or any(indices):
        return False
    clients = [client for handle in handles if (client := running.get(handle)) is not None]
    links = {client.link for client in clients}
    if len(clients) != len(handles) or len(links) != 1 or len({*counts}) != 1:
        return False
    samples = [client.emitted[0] for client in clients]
    if [*map(len, samples)] != offsets:
        return False
    for tokens, token in zip(samples, token_ids, strict=True):
        tokens.append(token)
    links.pop().add_columns([client.handle for client in clients], indices, offsets, counts, token_ids)
    return True


def _relay_tokens(
    handles: list[int],
    indices: list[int],
    offsets: list[int],
    counts: list[int],
    token_ids: list[int],
    running: Mapping[int, ClientSide],
    broken: list[tuple[int, str]],
) -> int:
    """Pass on whatever tokens there are. Returns how many nobody was to see; adds to `broken`."""
    start = num_dropped = 0
    for handle, index, offset, count in zip(handles, indices, offsets, counts, strict=True):
        stop = start + count
        client = running.get(handle)
        if client is not None:
            emitted = client.emitted
            if index < len(emitted) and offset <= (known := len(tokens := emitted[index])):
                new = token_ids[start + known - offset : stop]
                if known != offset:
                    num_dropped += min(known - offset, count)
                if new:
                    tokens += new
                    client.link.add_tokens(client.handle, index, known, new)
            else:
                num_dropped += count
                broken.append((handle, f"tokens of sample {index} at offset {offset} do not follow the last ones"))
        else:
            num_dropped += count
        start = stop
    return num_dropped


def _relay_logprobs(logprobs: link_pb2.LinkLogprobs, client: ClientSide, broken: list[tuple[int, str]]) -> None:
    known = client.logprobs_passed.get(logprobs.index, 0)
    end = logprobs.offset + len(logprobs.values.logprobs)
    if logprobs.index >= len(client.emitted) or logprobs.offset > known:
        where = f"of sample {logprobs.index} at offset {logprobs.offset}"
        broken.append((logprobs.handle, f"log-probabilities {where} do not follow the last ones"))
    elif end > known:
        _skip(logprobs, known)
        client.logprobs_passed[logprobs.index] = end
        logprobs.handle = client.handle
        client.link.add_logprobs(logprobs)


def _relay_prompt_logprobs(logprobs: link_pb2.LinkLogprobs, client: ClientSide, broken: list[tuple[int, str]]) -> None:
    end = logprobs.offset + len(logprobs.values.logprobs)
    if logprobs.offset > client.prompt_logprobs_passed or end > client.num_prompt_tokens:
        broken.append(
            (logprobs.handle, f"log-probabilities of the prompt at offset {logprobs.offset} are not the next ones")
        )
    elif end > client.prompt_logprobs_passed:
        _skip(logprobs, client.prompt_logprobs_passed)
        client.prompt_logprobs_passed = end
        logprobs.handle = client.handle
        client.link.add_prompt_logprobs(logprobs)


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
