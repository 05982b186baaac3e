"""One running request, with the state that is needed to send it to another scheduler."""

from __future__ import annotations

import asyncio
import enum
import hashlib
import math
import os
from array import array

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import ModelIdentity
from scalellm.services.tokenizer.scheduler_link import SchedulerLink
from scalellm.services.tokenizer.token_receiver import Resubmission, TokenReceiver
from scalellm.v1 import common_pb2, link_pb2

_BLOCK_TOKENS = 64
"""Tokens at the beginning of a prompt that decide which scheduler it goes to: one block of the schedulers' prefix
index."""


class Move(enum.Enum):
    """The reason for which a request loses its scheduler. The values are labels of metrics."""

    LOST = "lost"
    GIVEN_BACK = "given_back"
    """The scheduler drains."""


class RunningRequest:
    """A request from its first Submit to its end.

    Args:
        submit: The first attempt here. With an `execution_id` and samples in `resumed` it continues an earlier run.
        min_tokens: See TokenReceiver.
        now: Monotonic nanoseconds.

    Attributes:
        receiver: Receiver of its results.
        link: Link on which it runs now; None while it waits for a scheduler, and after its end.
        identity: The model with which it began, and with which alone its tokens can be continued.
        losses: Schedulers that were lost in a row, without a new token in between.
        why_lost: Error of the last link.
        move: Reason of that loss.
        timer: Ends its wait for a scheduler.
    """

    __slots__ = (
        "_deadline", "_first_sent_at", "_handle", "_num_resumed", "_route_key", "_sent_at", "_submit",
        "identity", "link", "losses", "move", "receiver", "timer", "why_lost",
    )  # fmt: skip

    def __init__(self, submit: link_pb2.Submit, min_tokens: int, now: int) -> None:
        sampling = submit.sampling
        self.receiver = TokenReceiver(
            sampling.n,
            logprobs=sampling.HasField("logprobs"),
            num_prompt_logprobs=len(submit.token_ids) if sampling.HasField("prompt_logprobs") else 0,
            min_tokens=min_tokens,
        )
        self.identity: ModelIdentity | None = None
        self.link: SchedulerLink | None = None
        self.losses = 0
        self.why_lost = StatusError.unavailable("it was not lost")
        self.move = Move.LOST
        self.timer: asyncio.TimerHandle | None = None
        submit.execution_id = submit.execution_id or os.urandom(16)
        self.receiver.start_at(submit.resumed)
        self._submit = submit
        self._route_key = _route_key(submit)
        self._deadline = now + submit.time_remaining_ns if submit.HasField("time_remaining_ns") else None
        self._first_sent_at = self._sent_at = now
        self._num_resumed = 0
        self._handle = 0

    @property
    def tenant(self) -> bytes:
        """Identifier of the tenant on links."""
        return self._submit.tenant

    def can_go_to(self, link: SchedulerLink) -> bool:
        """True if the scheduler supports all features that the request asks for."""
        return not self._submit.grammar or (link.welcome is not None and link.welcome.grammars)

    def choose(self, links: list[SchedulerLink]) -> SchedulerLink:
        """Choose the request's link by rendezvous hashing: all workers choose the same scheduler, and when one joins or
        leaves, only the requests of that one move.
        """
        if len(links) == 1:
            return links[0]
        return max(links, key=lambda link: hashlib.blake2b(link.address.encode() + self._route_key).digest())

    def send(self, link: SchedulerLink, now: int) -> None:
        """Send it to a scheduler."""
        self.link, self.identity = link, link.identity
        self._sent_at = now
        self._handle = link.submit(self._submit, self.receiver)

    def send_again(self, link: SchedulerLink, now: int) -> None:
        """Send it again, to another scheduler or the same one, which continues from the tokens received so far."""
        submit, progress = self._submit, self.receiver.progress
        submit.attempt += 1
        if self._deadline is not None:
            submit.time_remaining_ns = max(0, self._deadline - now)
        progress.resume(submit)
        self._num_resumed = progress.num_tokens
        self.receiver.resubmissions += (Resubmission(now, link.address, submit.attempt, self.why_lost.message),)
        self.send(link, now)

    def seconds_left(self, now: int) -> float:
        """Return the seconds until its deadline; infinite without one."""
        return (self._deadline - now) / 1e9 if self._deadline is not None else math.inf

    def stop_sample(self, index: int) -> None:
        """End a sample in which a stop text was found."""
        self.receiver.progress.end_sample(index, common_pb2.FINISH_REASON_STOP)
        if self.link is not None:
            self.link.stop_sample(self._handle, index)

    def lose_link(self, why: StatusError, move: Move) -> None:
        """Record that the request's scheduler was lost, or gave the request back."""
        self.link = None
        self.why_lost = why
        self.move = move

    def count_loss(self) -> None:
        """Count the loss of the request's scheduler."""
        has_come_further = self.receiver.progress.num_tokens > self._num_resumed
        self.losses = 1 if has_come_further else self.losses + 1

    def finish(self, finish: link_pb2.Finish, now: int) -> None:
        """Pass the scheduler's Finish on to the receiver. Time spent with earlier schedulers counts as failover."""
        self.link = None
        finish.timings.failover_ns += self._sent_at - self._first_sent_at
        self.receiver.on_finish(finish, now)

    def finish_here(self, now: int) -> None:
        """Make a Finish for a request whose samples have all ended, because its scheduler was lost before it
        sent one.
        """
        progress = self.receiver.progress
        usage = common_pb2.Usage(
            prompt_tokens=len(self._submit.token_ids),
            completion_tokens=progress.num_tokens,
            num_resumed=self._num_resumed,
        )
        self.finish(link_pb2.Finish(usage=usage), now)

    def release(self, reason: link_pb2.AbortReason) -> None:
        """Release the request, whose results are no longer read. If it still runs it is aborted for `reason`."""
        self.stop_waiting()
        if self.link is not None:
            self.link.release(self._handle, reason)
            self.link = None

    def stop_waiting(self) -> None:
        """Stop waiting for a scheduler: cancel the timer."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def _route_key(submit: link_pb2.Submit) -> bytes:
    """Return the key of requests that belong on one scheduler: their session, or the beginning of their prompts."""
    if submit.session_id:
        return b"session " + submit.session_id.encode()
    return b"prefix " + submit.cache_salt + array("I", submit.token_ids[:_BLOCK_TOKENS]).tobytes()
