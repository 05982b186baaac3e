"""One call that reads a kept request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.generation.answer import Answer, Event, make_samples
from scalellm.services.tokenizer.generation.answer_shape import splits
from scalellm.services.tokenizer.kept.kept_request import KeptRequest
from scalellm.services.tokenizer.latency import LatencyTrace
from scalellm.services.tokenizer.sample_stream import OutputOptions


async def follow(
    kept: KeptRequest,
    offsets: Sequence[int],
    min_tokens: int,
    trace: LatencyTrace,
    *,
    repeats: bool = False,
) -> AsyncGenerator[Event, None]:
    """Yield the events of a request, Deltas from `offsets` on. Raises StatusError for every end but OK.

    Args:
        kept: The request.
        offsets: Tokens of each sample that the client has; missing ones are 0.
        min_tokens: Tokens of a sample to wait for.
        trace: Receives the time of detokenising.
        repeats: True to also yield the events that the client has, in Deltas that end at `offsets`, for formats that
            count all events or repeat the whole answer. Offsets may then be beyond the answer's end.
    """
    head, transcript = kept.head, kept.transcript
    num_samples = head.submit.sampling.n
    if len(offsets) > num_samples:
        raise StatusError.invalid(
            "offsets", f"must have at most {num_samples} entries, one per sample, got {len(offsets)}"
        )
    offsets = [*offsets, *[0] * (num_samples - len(offsets))]
    options = OutputOptions.from_request(head.request)
    samples = make_samples(head.request, options, head.submit, kept.edge.prompts.writing)
    answer = Answer(
        head.submit.token_ids,
        samples,
        trace,
        kept.edge.model_metrics,
        lambda index: None,
        () if repeats else offsets,
        # Several parts of an answer may belong to one token, and a client may resume between them. It then gets the
        # rest.
        by_token=splits(head.request),
    )
    with kept.followed(), transcript.reader(offsets, min_tokens, repeats=repeats) as reader:
        await kept.wait_accepted()
        yield head.started
        while not transcript.is_over or reader.changed.is_set():
            await reader.wait()
            for event in answer.take(reader):
                yield event
    reader.raise_error()
    for index, sample in enumerate(samples):
        if sample.num_tokens < offsets[index] and not repeats:
            raise StatusError.invalid(
                f"offsets[{index}]", f"must be at most {sample.num_tokens}, all tokens of it, got {offsets[index]}"
            )
    assert transcript.finished is not None
    yield transcript.finished
