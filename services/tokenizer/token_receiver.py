"""The inbox of one request, which the link fills, and the task that writes to the client empties.

If the client is slow, new tokens are added to the waiting ones, so an inbox holds at most the request's tokens, and the
next message contains them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import ProgressError, RequestProgress, cut_logprobs
from scalellm.services.tokenizer.limits import MAX_ANSWER_TOKENS
from scalellm.v1 import common_pb2, link_pb2


@dataclass(slots=True)
class TokenBatch:
    """Consecutive tokens of one sample, and its end if that came with or after them.

    Attributes:
        index: The sample.
        token_ids: In order.
        logprobs: One entry per token, when asked for.
        finish: The executor's end of the sample.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: common_pb2.TokenLogprobs | None = None
    finish: link_pb2.LinkSampleFinish | None = None

    def parts(self, most: int = MAX_ANSWER_TOKENS) -> list[TokenBatch]:
        """Return the same as batches of at most `most` tokens, by default what one message can hold.

        The last one has the end.
        """
        count = len(self.token_ids)
        parts = []
        for start in range(0, max(1, count), most):
            stop = start + most
            logprobs = None if self.logprobs is None else cut_logprobs(self.logprobs, start, stop)
            finish = self.finish if stop >= count else None
            parts.append(TokenBatch(self.index, self.token_ids[start:stop], logprobs, finish))
        return parts


@dataclass(frozen=True, slots=True)
class Resubmission:
    """Record of a request that was sent again because its scheduler was lost or gave it back.

    Attributes:
        at: Time, in monotonic nanoseconds.
        address: host:port of the scheduler that it was sent to.
        attempt: Number of this attempt, as executors know it.
        reason: Error of the previous scheduler.
    """

    at: int
    address: str
    attempt: int
    reason: str


class _Inbox:
    """The tokens of one sample that were not taken yet."""

    __slots__ = ("finish", "logprobs", "num_taken", "tokens")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.num_taken = 0
        self.logprobs: common_pb2.TokenLogprobs | None = None
        self.finish: link_pb2.LinkSampleFinish | None = None


class TokenReceiver:
    """The results of one request that its links delivered and that were not taken yet.

    Args:
        num_samples: Samples of the request.
        logprobs: True if each token must come with its log-probability.
        num_prompt_logprobs: Tokens of the prompt whose log-probabilities must come before the first token.
        min_tokens: Tokens of a sample to wait for before the taker is woken, except for the first and the last ones.

    Attributes:
        progress: All received tokens and ends, taken or not.
        resubmissions: Each resubmission, in order.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        logprobs: bool = False,
        num_prompt_logprobs: int = 0,
        min_tokens: int = 1,
    ) -> None:
        self.progress = RequestProgress(num_samples, num_prompt_logprobs)
        self.finish: link_pb2.Finish | None = None
        self._logprobs = logprobs
        self._error: StatusError | None = None
        self._min_tokens = min_tokens
        self._inboxes = [_Inbox(tokens) for tokens in self.progress.tokens]
        self._dirty: dict[int, None] = {}
        self._prompt = common_pb2.TokenLogprobs()
        """Log-probabilities of the prompt that were not taken yet."""
        # A flag and a future, because an asyncio.Event, which supports many waiters, costs three times as much per
        # message.
        self._awake = False
        self._waiter: asyncio.Future[None] | None = None
        self.first_token_at = 0
        self.last_token_at = 0
        self.finished_at = 0
        self.resubmissions: tuple[Resubmission, ...] = ()

    @property
    def is_over(self) -> bool:
        """True if the request has ended."""
        return self.finish is not None or self._error is not None

    def start_at(self, samples: Iterable[link_pb2.ResumedSample]) -> None:
        """Start after the given samples' tokens, which count as taken."""
        self.progress.start_at(samples)
        for inbox in self._inboxes:
            inbox.num_taken = len(inbox.tokens)

    # Called by the link.

    def on_tokens(self, index: int, offset: int, token_ids: list[int], now: int) -> None:
        """Add new tokens of a sample; `now` in nanoseconds of the monotonic clock."""
        inboxes = self._inboxes
        if index < len(inboxes) and len(tokens := inboxes[index].tokens) == offset:
            tokens += token_ids
        else:
            # A replay after a failover may begin with tokens that were received before.
            try:
                token_ids = self.progress.add_tokens(index, offset, token_ids)
            except ProgressError as error:
                self._fail_for(error)
                return
        if not token_ids:
            return
        if not self.first_token_at:
            self.first_token_at = now
        self.last_token_at = now
        self._dirty[index] = None
        inbox = inboxes[index]
        num_tokens = len(inbox.tokens)
        if num_tokens - inbox.num_taken >= self._min_tokens or num_tokens == len(token_ids):
            self.wake()

    def on_logprobs(self, entry: link_pb2.LinkLogprobs) -> None:
        """Add log-probabilities of new tokens, which come with the tokens or before them. The entry is changed."""
        try:
            is_new = self.progress.add_logprobs(entry)
        except ProgressError as error:
            self._fail_for(error)
            return
        if is_new:
            inbox = self._inboxes[entry.index]
            if inbox.logprobs is None:
                inbox.logprobs = common_pb2.TokenLogprobs()
            self._append(inbox.logprobs, entry.values)

    def on_prompt_logprobs(self, entry: link_pb2.LinkLogprobs) -> None:
        """Add log-probabilities of a part of the prompt. The entry is changed."""
        try:
            is_new = self.progress.add_prompt_logprobs(entry)
        except ProgressError as error:
            self._fail_for(error)
            return
        if is_new:
            self._append(self._prompt, entry.values)
            if len(self._prompt.logprobs) >= MAX_ANSWER_TOKENS:
                self.wake()

    def on_sample_finish(self, finish: link_pb2.LinkSampleFinish) -> None:
        """Record the end of a sample."""
        try:
            self.progress.end_sample(finish.index, finish.reason)
        except ProgressError as error:
            self._fail_for(error)
            return
        # Stored even if a stop text has ended the sample here before. The taker then ignores it.
        self._inboxes[finish.index].finish = finish
        self._dirty[finish.index] = None
        self.wake()

    def on_finish(self, finish: link_pb2.Finish, now: int) -> None:
        """Record the end of the request; `now` in nanoseconds of the monotonic clock."""
        self.finish = finish
        self.finished_at = now
        self.wake()

    def fail(self, error: StatusError) -> None:
        """End the request with an error, because it is lost."""
        self._error = self._error or error
        self.wake()

    # Called by the task that takes the tokens.

    async def wait(self) -> None:
        """Wait until there is something to take, for one waiter at a time. Raises StatusError if the request
        is lost.
        """
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
        """True if tokens wait to be taken, due or not."""
        return bool(self._dirty)

    def take(self) -> list[TokenBatch]:
        """Take the due batches, samples in the order in which their tokens came. Raises StatusError if results are
        missing.
        """
        batches = []
        progress = self.progress
        for index in list(self._dirty):
            inbox = self._inboxes[index]
            num_tokens = len(inbox.tokens)
            num_waiting = num_tokens - inbox.num_taken
            if num_waiting < self._min_tokens and inbox.num_taken and inbox.finish is None and not self.finish:
                continue
            del self._dirty[index]
            if self._logprobs and (num_logprobs := progress.num_logprobs[index]) != num_tokens:
                raise _broken(f"skipped log-probabilities {num_logprobs} to {num_tokens - 1} of sample {index}")
            batch = TokenBatch(index, inbox.tokens[inbox.num_taken :], inbox.logprobs, inbox.finish)
            inbox.num_taken = num_tokens
            inbox.logprobs = inbox.finish = None
            if num_waiting <= MAX_ANSWER_TOKENS:
                batches.append(batch)
            else:
                batches += batch.parts()
        if batches and progress.num_prompt_logprobs < progress.num_prompt_tokens:
            first, last = progress.num_prompt_logprobs, progress.num_prompt_tokens - 1
            raise _broken(f"skipped log-probabilities {first} to {last} of the prompt")
        return batches

    def take_prompt_logprobs(self) -> list[tuple[int, common_pb2.TokenLogprobs]]:
        """Take the waiting log-probabilities of the prompt, as parts that each fit into one message.

        Each part comes with the number of tokens before it. All parts but the last have the same number of tokens, so
        they do not depend on how the executor divided them. Must be called before `take`, until there are none.
        """
        count = len(self._prompt.logprobs)
        num_known = self.progress.num_prompt_logprobs
        if num_known < self.progress.num_prompt_tokens:
            count -= count % MAX_ANSWER_TOKENS
        if not count:
            return []
        first, waiting = num_known - len(self._prompt.logprobs), self._prompt
        self._prompt = cut_logprobs(waiting, count, len(waiting.logprobs))
        return [
            (first + start, cut_logprobs(waiting, start, min(start + MAX_ANSWER_TOKENS, count)))
            for start in range(0, count, MAX_ANSWER_TOKENS)
        ]

    def _append(self, target: common_pb2.TokenLogprobs, values: common_pb2.TokenLogprobs) -> None:
        fit = len(values.top_token_ids) == len(values.top_logprobs) == len(values.logprobs) * values.num_top
        if not fit or (target.logprobs and target.num_top != values.num_top):
            self.fail(_broken("sent alternatives that do not fit the tokens"))
            return
        target.num_top = values.num_top
        target.logprobs.extend(values.logprobs)
        target.top_token_ids.extend(values.top_token_ids)
        target.top_logprobs.extend(values.top_logprobs)

    def _fail_for(self, error: ProgressError) -> None:
        self.fail(_broken(str(error)))


def _broken(problem: str) -> StatusError:
    return StatusError(grpc.StatusCode.INTERNAL, f"the scheduler {problem}")
