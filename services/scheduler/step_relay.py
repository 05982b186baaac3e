"""Passes one executor step on to the client links it concerns: the per-token path of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping

from scalellm.services.common.link import ProgressError, token_runs
from scalellm.services.scheduler.books import Books
from scalellm.services.scheduler.client_side import ClientSide
from scalellm.v1 import link_pb2


def relay_step(step: link_pb2.StepOutput, running: Mapping[int, ClientSide], books: Books) -> list[tuple[int, str]]:
    """Pass tokens, log-probabilities and sample ends on, each exactly once.

    Tokens that the client already has are dropped, which makes resubmission idempotent. Entries with unknown handles
    are dropped too: their requests ended here before the executor learned of it. The caller handles the Finishes.

    Args:
        step: A frame of one executor; changed.
        running: The clients of the requests on that executor, by the handles used there.
        books: Counts of tokens; updated.

    Returns:
        The executor's handles of requests whose entries contradict the protocol, with what is wrong.
    """
    # Lists, because each access to a protobuf column makes an object, which costs more than the rest of the loop.
    handles, indices, offsets, counts = step.handles[:], step.indices[:], step.offsets[:], step.counts[:]
    token_ids = step.token_ids[:]
    books.tokens_received += len(token_ids)
    broken: list[tuple[int, str]] = []
    if not _relay_decodes(handles, indices, offsets, counts, token_ids, running):
        books.tokens_dropped += _relay_tokens(step, running, broken)
    for logprobs in step.logprobs:
        if (client := running.get(logprobs.handle)) is None:
            continue
        try:
            is_new = client.progress.add_logprobs(logprobs)
        except ProgressError as error:
            broken.append((logprobs.handle, str(error)))
            continue
        if is_new:
            logprobs.handle = client.handle
            client.link.add_logprobs(logprobs)
    links = set()
    for logprobs in step.prompt_logprobs:
        if (client := running.get(logprobs.handle)) is None:
            continue
        links.add(client.link)
        try:
            is_new = client.progress.add_prompt_logprobs(logprobs)
        except ProgressError as error:
            broken.append((logprobs.handle, str(error)))
            continue
        if is_new:
            logprobs.handle = client.handle
            client.link.add_prompt_logprobs(logprobs)
    for sample in step.finished_samples:
        if (client := running.get(sample.handle)) is None:
            continue
        try:
            is_new = client.progress.end_sample(sample.index, sample.reason)
        except ProgressError as error:
            broken.append((sample.handle, str(error)))
            continue
        if is_new:
            client.stopping_samples.pop(sample.index, None)
            sample.handle = client.handle
            client.link.add_sample_finish(sample)
    for link in links:
        link.flush_if_full()
    return broken


def _relay_decodes(
    handles: list[int],
    indices: list[int],
    offsets: list[int],
    counts: list[int],
    token_ids: list[int],
    running: Mapping[int, ClientSide],
) -> bool:
    """Fast path for the most frequent frame: one next token for each request, all for one client link.

    Returns False, with nothing done, for any other frame.
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


def _relay_tokens(step: link_pb2.StepOutput, running: Mapping[int, ClientSide], broken: list[tuple[int, str]]) -> int:
    """Pass on the tokens of any frame. Returns the number of dropped tokens; adds protocol violations to `broken`."""
    num_dropped = 0
    for handle, index, offset, token_ids in token_runs(step):
        client, count = running.get(handle), len(token_ids)
        if client is not None:
            new = token_ids
            emitted = client.emitted
            if index < len(emitted) and len(tokens := emitted[index]) == offset:
                tokens += new
            else:
                # A replay after a failover may begin with tokens that the client already has.
                try:
                    new = client.progress.add_tokens(index, offset, new)
                except ProgressError as error:
                    broken.append((handle, str(error)))
                    new = []
                num_dropped += count - len(new)
                offset += count - len(new)
            if new:
                client.link.add_tokens(client.handle, index, offset, new)
        else:
            num_dropped += count
    return num_dropped
