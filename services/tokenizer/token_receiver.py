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
from services.tokenizer.limits import MAX_ANSWER_TOKENS


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

    def parts(self) -> list[TokenBatch]:
        """The same as batches that one message each can hold; the end is told by the last."""
        count = len(self.token_ids)
        if count <= MAX_ANSWER_TOKENS:
            return [self]
        parts = []
        for start in range(0, count, MAX_ANSWER_TOKENS):
            stop = start + MAX_ANSWER_TOKENS
            logprobs = None if self.logprobs is None else slice_logprobs(self.logprobs, start, stop)
            finish = self.finish if stop >= count else None
            parts.append(TokenBatch(self.index, self.token_ids[start:stop], logprobs, finish))
        return parts


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
        num_prompt_logprobs: Tokens of the prompt whose log-probabilities must come before the first token.
        min_tokens: Tokens of a sample to wait for before the taker is woken, beside the first and the last ones.
    """

    def __init__(
        self,
        handle: int,
        num_samples: int,
        *,
        logprobs: bool = False,
        num_prompt_logprobs: int = 0,
        min_tokens: int = 1,
    ) -> None:
        self.handle = handle
        self._logprobs = logprobs
        self.finish: link_pb2.Finish | None = None
        self._error: StatusError | None = None
        self._min_tokens = min_tokens
        self._inboxes = [_Inbox(TokenBatch(index)) for index in range(num_samples)]
        self._dirty: dict[int, None] = {}
        self._num_prompt_logprobs = num_prompt_logprobs
        self._prompt = common_pb2.TokenLogprobs()
        self._next_prompt_logprob = 0
        """Tokens of the prompt whose log-probabilities have come; those of the last ones wait in `_prompt`."""
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
        inbox.next_logprob += self._append(inbox.batch.logprobs, entry, skip=inbox.next_logprob - entry.offset)

    def on_prompt_logprobs(self, entry: link_pb2.LinkLogprobs) -> None:
        """Log-probabilities of a part of the prompt."""
        known = self._next_prompt_logprob
        if entry.offset > known:
            self._lost(f"log-probabilities {known} to {entry.offset - 1} of the prompt")
            return
        self._next_prompt_logprob += self._append(self._prompt, entry, skip=known - entry.offset)
        if len(self._prompt.logprobs) >= MAX_ANSWER_TOKENS:
            self.wake()

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
            batches += batch.parts()
        if batches and self._next_prompt_logprob < self._num_prompt_logprobs:
            last = self._num_prompt_logprobs - 1
            raise _skipped(f"log-probabilities {self._next_prompt_logprob} to {last} of the prompt")
        return batches

    def take_prompt_logprobs(self) -> list[tuple[int, common_pb2.TokenLogprobs]]:
        """Return what waits of the prompt's log-probabilities, as parts that one message each can hold.

        Each comes with the number of tokens before it. All have as many tokens but the last, wherever the executor
        divided them. To be called before `take`, until there are none.
        """
        count = len(self._prompt.logprobs)
        if self._next_prompt_logprob < self._num_prompt_logprobs:
            count -= count % MAX_ANSWER_TOKENS
        if not count:
            return []
        first, waiting = self._next_prompt_logprob - len(self._prompt.logprobs), self._prompt
        self._prompt = slice_logprobs(waiting, count, len(waiting.logprobs))
        return [
            (first + start, slice_logprobs(waiting, start, min(start + MAX_ANSWER_TOKENS, count)))
            for start in range(0, count, MAX_ANSWER_TOKENS)
        ]

    def _append(self, target: common_pb2.TokenLogprobs, entry: link_pb2.LinkLogprobs, skip: int) -> int:
        """Add the entries but for the first `skip`. Returns how many were added."""
        values, num_top = entry.values, entry.values.num_top
        added = max(0, len(values.logprobs) - skip)
        if not added:
            return 0
        fit = len(values.top_token_ids) == len(values.top_logprobs) == len(values.logprobs) * num_top
        if not fit or (target.logprobs and target.num_top != num_top):
            self.fail(
                StatusError(grpc.StatusCode.INTERNAL, "the scheduler sent alternatives that do not fit the tokens")
            )
            return 0
        target.logprobs.extend(values.logprobs[skip:])
        target.num_top = num_top
        target.top_token_ids.extend(values.top_token_ids[skip * num_top :])
        target.top_logprobs.extend(values.top_logprobs[skip * num_top :])
        return added

    def _inbox(self, index: int) -> _Inbox | None:
        if index < len(self._inboxes):
            return self._inboxes[index]
        self.fail(StatusError(grpc.StatusCode.INTERNAL, f"the scheduler sent sample {index}, which was not asked for"))
        return None

    def _lost(self, what: str) -> None:
        self.fail(_skipped(what))


def _skipped(what: str) -> StatusError:
    return StatusError(grpc.StatusCode.INTERNAL, f"the scheduler skipped {what}")


def slice_logprobs(values: common_pb2.TokenLogprobs, start: int, stop: int) -> common_pb2.TokenLogprobs:
    """Return the entries of the tokens `[start, stop)`."""
    if start == 0 and stop >= len(values.logprobs):
        return values
    top = slice(start * values.num_top, stop * values.num_top)
    return common_pb2.TokenLogprobs(
        logprobs=values.logprobs[start:stop],
        num_top=values.num_top,
        top_token_ids=values.top_token_ids[top],
        top_logprobs=values.top_logprobs[top],
    )
