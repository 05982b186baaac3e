"""One executor's window of credits among the links of several schedulers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine_kit
from scalellm.services.common.link import API_MINOR
from scalellm.services.executor.build import LoadedEngine
from scalellm.services.executor.credit_window import Claim, divide
from scalellm.services.executor.engine import Engine
from scalellm.services.executor.engine_process import EngineLoop
from scalellm.services.executor.ipc import Kind, Message
from scalellm.v1 import common_pb2, executor_pb2, link_pb2

claims = st.lists(st.builds(Claim, st.integers(0, 50), st.integers(0, 50), st.integers(1, 5)), min_size=1, max_size=6)


@given(st.integers(1, 100), claims)
def test_the_window_is_divided_and_not_exceeded(window: int, claims: list[Claim]) -> None:
    shares = divide(window, claims)
    assert all(share >= max(1, claim.held) for share, claim in zip(shares, claims, strict=True))
    held = sum(claim.held for claim in claims)
    assert sum(share - (claim.held == 0 and share == 1) for share, claim in zip(shares, claims, strict=True)) <= max(
        window, held
    )
    assert sum(shares) >= window  # nothing lies idle


@given(st.integers(1, 100), claims)
def test_who_wants_something_comes_before_who_wants_nothing(window: int, claims: list[Claim]) -> None:
    shares = divide(window, claims)
    short = any(share < claim.held + claim.wanted for share, claim in zip(shares, claims, strict=True))
    if short:
        for share, claim in zip(shares, claims, strict=True):
            assert share <= max(1, claim.held + claim.wanted)


@given(st.integers(1, 100), claims)
def test_by_weight_who_wants_something_comes_to_hold_alike(window: int, claims: list[Claim]) -> None:
    shares = list(zip(divide(window, claims), claims, strict=True))
    for share, claim in shares:
        for other_share, other in shares:
            if share < claim.held + claim.wanted and other_share > max(1, other.held):
                assert share >= (other_share - 1) / other.weight * claim.weight - 1  # but for rounding


@pytest.mark.parametrize(
    ("claims", "shares"),
    [
        ([Claim(0, 0)], [12]),
        ([Claim(9, 40)], [12]),
        ([Claim(0, 0), Claim(0, 0)], [6, 6]),
        ([Claim(0, 99), Claim(0, 0)], [12, 1]),
        ([Claim(0, 99), Claim(0, 2)], [10, 2]),
        ([Claim(0, 99, 3), Claim(0, 99, 1)], [9, 3]),
        ([Claim(12, 99), Claim(0, 99)], [12, 1]),
        ([Claim(10, 99), Claim(1, 99)], [10, 2]),
        ([Claim(20, 0), Claim(3, 0)], [20, 3]),
    ],
)
def test_examples(claims: list[Claim], shares: list[int]) -> None:
    assert divide(12, claims) == shares


class Scheduler:
    """One scheduler as the executor sees it: it submits what its credits allow, and says what else waits."""

    def __init__(self, link: int, queued: int, tenants: int) -> None:
        self.link = link
        self.queued = queued
        self.tenants = tenants
        self.submitted = Counter[str]()
        self.granted = Counter[str]()
        self.running = 0
        self.finished = 0

    def take(self, load: link_pb2.Load) -> None:
        if load.HasField("granted_requests"):
            self.granted["requests"] = load.granted_requests
            self.granted["tokens"] = load.granted_prefill_tokens

    def renewal(self) -> link_pb2.ClientFrame:
        return link_pb2.ClientFrame(
            renewal=link_pb2.Renewal(
                queued_requests=self.queued, queued_tokens=self.queued * 6, queued_tenants=self.tenants
            )
        )

    def next(self, rng: random.Random) -> link_pb2.ClientFrame | None:
        if not self.queued or any(self.submitted[what] >= self.granted[what] for what in ("requests", "tokens")):
            return None
        self.queued -= 1
        handle = self.submitted["requests"]
        self.submitted += Counter(requests=1, tokens=6)
        self.running += 1
        sampling = common_pb2.SamplingParams(max_tokens=rng.randint(1, 12), ignore_eos=True, seed=1)
        return link_pb2.ClientFrame(submit=link_pb2.Submit(handle=handle, token_ids=[1] * 6, sampling=sampling))


class Executor:
    """A real engine loop without a process, on the fake paged runner."""

    def __init__(self) -> None:
        config = engine_kit.make_config(num_blocks=256, max_num_seqs=8, max_num_batched_tokens=24)
        clock = engine_kit.SimClock()
        runner = engine_kit.FakePagedRunner(config, on_execute=lambda batch: clock.advance(1.0))
        self.engine = Engine(config, runner, clock)
        self.links: dict[int, Scheduler] = {}
        loaded = LoadedEngine(self.engine, link_pb2.Welcome(), executor_pb2.GetExecutorInfoResponse())
        self.loop = EngineLoop(loaded, self, clock)  # type: ignore[arg-type]

    def send(self, *messages: Message) -> None:
        for message in messages:
            if message.kind in (Kind.FRAME, Kind.WELCOME) and message.link in self.links:
                frame = link_pb2.ServerFrame.FromString(message.payload)
                scheduler = self.links[message.link]
                scheduler.take(frame.welcome.load if frame.HasField("welcome") else frame.step.load)
                scheduler.running -= len(frame.step.finished)
                scheduler.finished += len(frame.step.finished)
            assert message.kind is not Kind.REFUSE, message

    def open(self, scheduler: Scheduler) -> None:
        self.links[scheduler.link] = scheduler
        hello = link_pb2.ClientFrame(hello=link_pb2.Hello(api_minor=API_MINOR))
        self.loop._handle(Message(Kind.OPEN, scheduler.link, hello.SerializeToString()))

    def close(self, scheduler: Scheduler) -> None:
        del self.links[scheduler.link]
        self.loop._handle(Message(Kind.CLOSE, scheduler.link))

    def tell(self, scheduler: Scheduler, frame: link_pb2.ClientFrame) -> None:
        self.loop._handle(Message(Kind.FRAME, scheduler.link, frame.SerializeToString()))

    def step(self) -> None:
        if self.engine.has_unfinished():
            self.loop._step()


WINDOW = 8 + 1
"""Requests: as many as run at once, and one to take the place of the first that ends."""


@given(st.integers(0, 2**32))
def test_schedulers_share_one_window_and_all_requests_end(seed: int) -> None:
    rng = random.Random(seed)
    executor = Executor()
    schedulers = [Scheduler(link, rng.choice((0, 3, 40)), rng.randint(1, 4)) for link in range(1, rng.randint(2, 5))]
    wanted = {scheduler.link: scheduler.queued for scheduler in schedulers}
    pending = list(schedulers)
    for _ in range(2000):
        if pending and rng.random() < 0.5:
            executor.open(pending.pop())
        for scheduler in list(executor.links.values()):
            if rng.random() < 0.7:
                executor.tell(scheduler, scheduler.renewal())
            while rng.random() < 0.9 and (frame := scheduler.next(rng)) is not None:
                executor.tell(scheduler, frame)
        executor.step()
        # What was sent before a link learnt that its credits had gone to others is part of what is held.
        granted = [
            max(scheduler.running, scheduler.granted["requests"] - scheduler.finished)
            for scheduler in executor.links.values()
        ]
        held = sum(scheduler.running for scheduler in executor.links.values())
        assert sum(granted) <= max(WINDOW, held) + len(granted)
        assert held <= WINDOW + len(granted) * WINDOW
        if not pending and not any(scheduler.queued or scheduler.running for scheduler in schedulers):
            break
        if rng.random() < 0.02 and len(executor.links) > 1:
            leaving = rng.choice(list(executor.links.values()))
            executor.close(leaving)
            wanted[leaving.link] = leaving.finished
            leaving.queued = leaving.running = 0
    assert {scheduler.link: scheduler.finished for scheduler in schedulers} == wanted  # nobody starves
    executor.loop._announce_load(executor.loop._links.values())
    left = list(executor.links.values())
    shares = [scheduler.granted["requests"] - scheduler.submitted["requests"] for scheduler in left]
    assert WINDOW <= sum(shares) <= WINDOW + len(left)  # nothing is lost
    executor.engine.check_integrity()
    assert executor.engine.load().free_blocks == executor.engine.load().total_blocks


def test_a_scheduler_of_the_version_before_is_taken_to_want_its_share() -> None:
    executor = Executor()
    new, old = Scheduler(1, 50, 1), Scheduler(2, 50, 1)
    executor.open(new)
    assert new.granted["requests"] == WINDOW  # alone it has the whole window
    executor.links[2] = old
    hello = link_pb2.ClientFrame(hello=link_pb2.Hello(api_minor=API_MINOR - 1))
    executor.loop._handle(Message(Kind.OPEN, 2, hello.SerializeToString()))
    executor.tell(new, new.renewal())
    assert sorted((new.granted["requests"], old.granted["requests"])) == [WINDOW // 2, WINDOW - WINDOW // 2]
    executor.close(old)
    assert new.granted["requests"] == WINDOW


def submit(handle: int, max_tokens: int = 40, in_place_of: Sequence[int] = ()) -> link_pb2.ClientFrame:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)
    return link_pb2.ClientFrame(
        submit=link_pb2.Submit(handle=handle, token_ids=[1], sampling=sampling, in_place_of=in_place_of)
    )


@pytest.mark.parametrize("ends_first", [False, True], ids=["given back", "ended before"])
def test_a_request_may_come_in_place_of_another_after_credits_moved_to_a_new_link(ends_first: bool) -> None:
    executor = Executor()
    first, second = Scheduler(1, 50, 1), Scheduler(2, 50, 1)
    executor.open(first)
    assert first.granted["requests"] == WINDOW
    executor.open(second)  # of which the first has not heard when it sends these
    executor.tell(second, second.renewal())
    for handle in range(WINDOW):
        executor.tell(first, submit(handle, max_tokens=1 if handle == 0 else 40))
    if ends_first:  # and its Finish is on the way
        while not first.finished:
            executor.step()
    executor.tell(first, submit(WINDOW, in_place_of=[0]))
    assert executor.engine.has_request((1, WINDOW))
    with pytest.raises(AssertionError, match="REFUSE"):  # one more than were granted
        executor.tell(first, submit(WINDOW + 1))
