"""One request's inbox: filled by the link, emptied by the task that writes to the client.

While the client is slow, what comes is added to what waits, so an inbox holds at most the request's own tokens and the
next message carries them all.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc

from scalellm.v1 import common_pb2, link_pb2
from services.common.errors import StatusError


@dataclass(slots=True)
class TokenBatch:
    """Consecutive tokens of one sample, and its end once that came with or after them.

    Attributes:
        index: The sample.
        token_ids: In order.
        logprobs: One entry per token, when asked for.
        finish: How the executor ended the sample.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: common_pb2.TokenLogprobs | None = None
    finish: link_pb2.LinkSampleFinish | None = None


@dataclass(slots=True)
class _Inbox:
    """What waits for one sample, and the offsets at which more must follow."""

    batch: TokenBatch
    next_token: int = 0
    next_logprob: int = 0


class TokenReceiver:
    """What the link delivered for one request and nobody has taken yet.

    Args:
        handle: The request's number on the link.
        num_samples: Samples of the request.
        logprobs: Whether each token must come with its log-probability.
        min_tokens: Tokens of a sample to wait for before the taker is woken, beside the first and the last ones.
    """

    def __init__(self, handle: int, num_samples: int, *, logprobs: bool = False, min_tokens: int = 1) -> None:
        self.handle = handle
        self._logprobs = logprobs
        self.finish: link_pb2.Finish | None = None
        self._error: StatusError | None = None
        self._min_tokens = min_tokens
        self._inboxes = [_Inbox(TokenBatch(index)) for index in range(num_samples)]
        self._dirty: dict[int, None] = {}
        self._prompt = common_pb2.TokenLogprobs()
        # A flag and a future: an asyncio.Event, made for many waiters, costs three times as much per message.
        self._awake = False
        self._waiter: asyncio.Future[None] | None = None
        self.first_token_at = 0
        self.last_token_at = 0
        self.finished_at = 0

    # The link's side.

    def on_tokens(self, index: int, offset: int, token_ids: list[int], now: int) -> None:
        """New tokens of a sample; `now` in nanoseconds of the monotonic clock."""
        inbox = self._inbox(index)
        if inbox is None:
            return
        duplicates = inbox.next_token - offset
        if duplicates < 0:
            self._lost(f"tokens {inbox.next_token} to {offset - 1} of sample {index}")
            return
        if duplicates:
            # A replay after a failover may begin with what is known already.
            token_ids = token_ids[duplicates:]
        if not token_ids:
            return
        waiting = inbox.batch.token_ids
        waiting += token_ids
        if not self.first_token_at:
            self.first_token_at = now
        self.last_token_at = now
        self._dirty[index] = None
        if len(waiting) >= self._min_tokens or inbox.next_token == 0:
            self.wake()
        inbox.next_token += len(token_ids)

    def on_logprobs(self, entry: link_pb2.LinkLogprobs) -> None:
        """Log-probabilities of new tokens; they come with the tokens or before them."""
        inbox = self._inbox(entry.index)
        if inbox is None:
            return
        if entry.offset > inbox.next_logprob:
            self._lost(f"log-probabilities {inbox.next_logprob} to {entry.offset - 1} of sample {entry.index}")
            return
        if inbox.batch.logprobs is None:
            inbox.batch.logprobs = common_pb2.TokenLogprobs()
        inbox.next_logprob += append_logprobs(
            inbox.batch.logprobs, entry.values, skip=inbox.next_logprob - entry.offset
        )

    def on_prompt_logprobs(self, entry: link_pb2.LinkLogprobs) -> None:
        """Log-probabilities of a part of the prompt."""
        known = len(self._prompt.logprobs)
        if entry.offset > known:
            self._lost(f"log-probabilities {known} to {entry.offset - 1} of the prompt")
            return
        append_logprobs(self._prompt, entry.values, skip=known - entry.offset)

    def on_sample_finish(self, finish: link_pb2.LinkSampleFinish) -> None:
        """A sample ended."""
        inbox = self._inbox(finish.index)
        if inbox is not None:
            inbox.batch.finish = finish
            self._dirty[finish.index] = None
            self.wake()

    def on_finish(self, finish: link_pb2.Finish, now: int) -> None:
        """The request ended; `now` in nanoseconds of the monotonic clock."""
        self.finish = finish
        self.finished_at = now
        self.wake()

    def fail(self, error: StatusError) -> None:
        """The request is lost."""
        self._error = self._error or error
        self.wake()

    # The taker's side.

    async def wait(self) -> None:
        """Wait until there is something to take. For one waiter. Raises StatusError when the request is lost."""
        if not self._awake:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._awake = False
        if self._error is not None:
            raise self._error

    def wake(self) -> None:
        """Let `wait`, or the next one, return."""
        self._awake = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def has_more(self) -> bool:
        """Whether something waits, due or not."""
        return bool(self._dirty)

    def take(self) -> list[TokenBatch]:
        """Return what waits and is due, samples in the order in which they came. Raises StatusError."""
        batches = []
        for index in list(self._dirty):
            inbox = self._inboxes[index]
            batch = inbox.batch
            is_first = inbox.next_token == len(batch.token_ids)
            if len(batch.token_ids) < self._min_tokens and not is_first and batch.finish is None and not self.finish:
                continue
            del self._dirty[index]
            inbox.batch = TokenBatch(index)
            if self._logprobs and inbox.next_logprob != inbox.next_token:
                raise _skipped(f"log-probabilities {inbox.next_logprob} to {inbox.next_token - 1} of sample {index}")
            batches.append(batch)
        return batches

    def take_prompt_logprobs(self, num_tokens: int) -> common_pb2.TokenLogprobs:
        """Return the prompt's log-probabilities, complete once the first token came. Raises StatusError."""
        known = len(self._prompt.logprobs)
        if known != num_tokens:
            raise _skipped(f"log-probabilities {known} to {num_tokens - 1} of the prompt")
        return self._prompt

    def _inbox(self, index: int) -> _Inbox | None:
        if index < len(self._inboxes):
            return self._inboxes[index]
        self.fail(StatusError(grpc.StatusCode.INTERNAL, f"the scheduler sent sample {index}, which was not asked for"))
        return None

    def _lost(self, what: str) -> None:
        self.fail(_skipped(what))


def _skipped(what: str) -> StatusError:
    return StatusError(grpc.StatusCode.INTERNAL, f"the scheduler skipped {what}")


def append_logprobs(target: common_pb2.TokenLogprobs, more: common_pb2.TokenLogprobs, skip: int = 0) -> int:
    """Add the entries of `more`, but for the first `skip`, to `target`. Returns how many were added."""
    added = max(0, len(more.logprobs) - skip)
    if added:
        target.logprobs.extend(more.logprobs[skip:])
        target.num_top = more.num_top
        target.top_token_ids.extend(more.top_token_ids[skip * more.num_top :])
        target.top_logprobs.extend(more.top_logprobs[skip * more.num_top :])
    return added


def slice_logprobs(values: common_pb2.TokenLogprobs, count: int) -> common_pb2.TokenLogprobs:
    """Return the first `count` entries."""
    if count >= len(values.logprobs):
        return values
    return common_pb2.TokenLogprobs(
        logprobs=values.logprobs[:count],
        num_top=values.num_top,
        top_token_ids=values.top_token_ids[: count * values.num_top],
        top_logprobs=values.top_logprobs[: count * values.num_top],
    )
