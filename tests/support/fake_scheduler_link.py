"""Schedulers at the other end of a worker's links, without connections: they emit and break when they are told."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import add_tokens, check_submit
from scalellm.services.tokenizer.scheduler_link import SchedulerLink
from scalellm.services.tokenizer.schedulers import Schedulers
from scalellm.services.tokenizer.token_receiver import TokenReceiver
from scalellm.v1 import common_pb2, link_pb2

PROMPT = [5, 6, 7, 8]
LENGTH = 12
LOST = StatusError.unavailable("killed")


def welcome(model: str = "m", max_model_len: int = 100) -> link_pb2.Welcome:
    return link_pb2.Welcome(model=model, max_model_len=max_model_len, vocab_size=1000)


def token(index: int, position: int) -> int:
    """Next token of the scripted model: a function of the sample and the position alone."""
    return 100 + (31 * position + 7 * index) % 800


def logprob(index: int, position: int) -> float:
    return -(position + index / 4)


@dataclass
class Running:
    """A request at a scripted scheduler: where each sample is, and which have ended."""

    submit: link_pb2.Submit
    done: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    num_prompt_logprobs: int = 0


class FakeScheduler:
    """The other end of a SchedulerLink, without a connection. It emits what it is told to, from where a Submit says."""

    def __init__(self, link: SchedulerLink) -> None:
        self.link = link
        self.running: dict[int, Running] = {}
        self.submits: list[link_pb2.Submit] = []
        self.aborts: list[tuple[int, int, int | None]] = []
        link._client.submit = self._on_submit  # type: ignore[method-assign]
        link._client.abort = self._on_abort  # type: ignore[method-assign]

    def _on_submit(self, sent: link_pb2.Submit) -> None:
        submit = link_pb2.Submit.FromString(sent.SerializeToString())
        check_submit(submit)
        assert submit.handle not in self.running
        self.submits.append(submit)
        running = self.running[submit.handle] = Running(submit)
        for sample in submit.resumed:
            assert list(sample.token_ids) == [token(sample.index, place) for place in range(len(sample.token_ids))]
            running.done[sample.index] = len(sample.token_ids)
            if sample.finished:
                running.ended.add(sample.index)

    def _on_abort(self, handle: int, reason: int, index: int | None = None) -> None:
        self.aborts.append((handle, reason, index))

    @property
    def is_up(self) -> bool:
        return self.link.is_up

    async def come_up(self, said: link_pb2.Welcome | None = None) -> None:
        self.link.on_up(said or welcome())
        await asyncio.sleep(0)

    def die(self, error: StatusError = LOST) -> None:
        self.running.clear()
        self.link.on_down(error)

    def give_back(self) -> None:
        """Give all requests back, as a scheduler does that has reached its drain limit."""
        status = LOST.to_link()
        handles, self.running = list(self.running), {}
        step = link_pb2.StepOutput(load=link_pb2.Load(draining=True))
        step.finished.extend(link_pb2.Finish(handle=handle, status=status, moved=True) for handle in handles)
        self.link.on_step(step)

    def step(self, chunk: int = 1, replay: int = 0) -> None:
        """Let each sample emit up to `chunk` tokens, after as many as `replay` that were emitted before."""
        step = link_pb2.StepOutput()
        for handle, running in list(self.running.items()):
            sampling = running.submit.sampling
            if sampling.HasField("prompt_logprobs") and running.num_prompt_logprobs < len(PROMPT):
                start = running.num_prompt_logprobs
                running.num_prompt_logprobs = end = min(start + chunk, len(PROMPT))
                values = common_pb2.TokenLogprobs(logprobs=[logprob(0, place) for place in range(start, end)])
                step.prompt_logprobs.add(handle=handle, offset=start, values=values)
                if end < len(PROMPT):
                    continue
            for index in range(sampling.n):
                if index not in running.ended:
                    self._step_sample(step, handle, running, index, chunk, replay)
            if len(running.ended) == sampling.n:
                step.finished.add(handle=handle, timings=link_pb2.HopTimings(decode_ns=1))
                del self.running[handle]
        self.link.on_step(step)

    @staticmethod
    def _step_sample(
        step: link_pb2.StepOutput, handle: int, running: Running, index: int, chunk: int, replay: int
    ) -> None:
        known = running.done.get(index, 0)
        start, end = max(0, known - replay), min(known + chunk, LENGTH)
        running.done[index] = end
        add_tokens(step, handle, index, start, [token(index, place) for place in range(start, end)])
        if running.submit.sampling.HasField("logprobs"):
            values = common_pb2.TokenLogprobs(logprobs=[logprob(index, place) for place in range(start, end)])
            step.logprobs.add(handle=handle, index=index, offset=start, values=values)
        if end == LENGTH:
            running.ended.add(index)
            step.finished_samples.add(handle=handle, index=index, reason=common_pb2.FINISH_REASON_LENGTH)


class Line:
    """A worker's Schedulers before scripted ones."""

    def __init__(self, num_schedulers: int = 1, **options) -> None:
        self.now = 1
        self.schedulers = Schedulers([], "test", b"", clock=lambda: self.now, **options)
        self.peers: list[FakeScheduler] = []
        for number in range(num_schedulers):
            self.schedulers.add(f"127.0.0.1:{number + 1}", "127.0.0.1")
        self.peers = [FakeScheduler(link) for link in self.schedulers._links.values()]

    def submit(
        self, n: int = 1, *, seconds: float | None = None, session: str = "", tenant: bytes = b"", **sampling: int
    ) -> TokenReceiver:
        submit = link_pb2.Submit(
            token_ids=PROMPT,
            sampling=common_pb2.SamplingParams(n=n, max_tokens=LENGTH, **sampling),
            session_id=session,
            tenant=tenant,
        )
        if seconds is not None:
            submit.time_remaining_ns = int(seconds * 1e9)
        return self.schedulers.submit(submit)

    @property
    def submits(self) -> list[link_pb2.Submit]:
        return [submit for peer in self.peers for submit in peer.submits]


class Taker:
    """Collects the tokens of one request."""

    def __init__(self, receiver: TokenReceiver) -> None:
        self.receiver = receiver
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.prompt: list[float] = []
        self.num_ends: dict[int, int] = defaultdict(int)

    def take(self) -> None:
        for offset, values in self.receiver.take_prompt_logprobs():
            assert offset == len(self.prompt)
            self.prompt += values.logprobs
        for batch in self.receiver.take():
            self.tokens[batch.index] += batch.token_ids
            if batch.logprobs is not None:
                self.logprobs[batch.index] += batch.logprobs.logprobs
            self.num_ends[batch.index] += batch.finish is not None


@contextmanager
def unconnected() -> Iterator[None]:
    """No SchedulerLink connects anywhere."""
    with mock.patch.object(SchedulerLink, "start"):
        yield
