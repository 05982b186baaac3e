"""Placement with the frames of executors and clients played by hand: credits, rows, and links that are lost."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from bench.virtual.loop import run_virtually
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import API_MINOR
from scalellm.services.scheduler.affinity_store import AffinityStore
from scalellm.services.scheduler.client_link import ClientLink
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.scheduler.dispatcher import Dispatcher
from scalellm.services.scheduler.dispatchers import Dispatchers
from scalellm.services.scheduler.replica_link import ReplicaLink
from scalellm.v1 import common_pb2, link_pb2

LENGTH = common_pb2.FINISH_REASON_LENGTH
GONE = StatusError.unavailable("gone")
STARTING = StatusError.unavailable("the engine is starting", retry_after=1.0)


def load(granted_requests: int) -> link_pb2.Load:
    return link_pb2.Load(
        free_blocks=100, total_blocks=100, granted_requests=granted_requests, granted_prefill_tokens=10_000
    )


class ByHand:
    """A scheduler with one executor, or several, whose frames the test writes.

    Attributes:
        sent: The Submits that the executors were sent.
        now: Time of the heartbeats, in seconds.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.now = 0.0
        affinity = AffinityStore(None, 60.0)
        settings = SchedulerSettings(stall_limit_s=30.0)
        self.dispatchers = Dispatchers(lambda: Dispatcher(settings, "test", affinity, clock=lambda: self.now))
        (self.dispatcher,) = self.dispatchers
        self.placement = self.dispatcher.placement
        self.sent: list[link_pb2.Submit] = []
        self.dispatchers.start()
        self.welcome = link_pb2.Welcome(
            api_minor=API_MINOR,
            model="m",
            block_size=16,
            num_blocks=100,
            max_model_len=1000,
            max_num_seqs=max_num_seqs,
            vocab_size=100,
            load=load(max_num_seqs),
        )
        self.replica = self.add("by-hand:1")

    def add(self, address: str, *, grammars: bool = False) -> ReplicaLink:
        replica = ReplicaLink(address, link_pb2.Hello(), self.placement, 1000.0)
        replica._client.submit = self._send
        self.dispatcher.fleet.replicas[address] = replica
        self.come(replica, grammars=grammars)
        return replica

    def come(self, replica: ReplicaLink, *, grammars: bool = False) -> None:
        self.welcome.instance_id, self.welcome.grammars = f"instance of {replica.address}", grammars
        replica.on_up(self.welcome)

    def _send(self, submit: link_pb2.Submit) -> None:
        copy = link_pb2.Submit()
        copy.CopyFrom(submit)
        self.sent.append(copy)

    def open(self, name: str, *, takes_any_model: bool = True) -> ClientLink:
        link = ClientLink(name, self.placement.books, takes_any_model=takes_any_model)
        self.dispatcher.intake.open_link(link)
        return link

    async def submit(self, link: ClientLink, handle: int, tenant: bytes = b"", n: int = 1, grammar: str = "") -> None:
        sampling = common_pb2.SamplingParams(n=n, seed=1, max_tokens=900)
        submit = link_pb2.Submit(handle=handle, token_ids=[1], sampling=sampling, tenant=tenant, grammar=grammar)
        self.dispatcher.intake.submit(link, submit)
        await self.turns()

    async def step(self, **fields: object) -> None:
        self.replica.on_step(link_pb2.StepOutput(**fields))
        await self.turns()

    async def emit(self, handle: int, count: int, index: int = 0) -> None:
        await self.step(handles=[handle], indices=[index], offsets=[0], counts=[count], token_ids=[5] * count)

    async def turns(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    async def stop(self) -> None:
        self.dispatcher.intake.end_all(StatusError.unavailable("the test ends"))
        await self.dispatchers.stop()


def note_ends(link: ClientLink) -> dict[int, tuple[float, link_pb2.LinkStatus]]:
    """Return the times and statuses of the requests that end on a link from now on, by their handles."""
    ends: dict[int, tuple[float, link_pb2.LinkStatus]] = {}
    add_finish, loop = link.add_finish, asyncio.get_running_loop()

    def note(finish: link_pb2.Finish) -> None:
        ends[finish.handle] = (loop.time(), finish.status)
        add_finish(finish)

    link.add_finish = note
    return ends


async def test_the_credit_of_a_request_that_was_taken_back_is_used_once() -> None:
    line = ByHand(max_num_seqs=2)
    link = line.open("edge")
    for handle in range(4):
        await line.submit(link, handle, b"flood")
    assert len(line.sent) == 2
    for submit in line.sent:
        await line.emit(submit.handle, 300)
    await line.submit(link, 4, b"quiet")
    assert [list(submit.in_place_of) for submit in line.sent] == [[], [], [line.sent[1].handle]]
    await line.step(load=load(3))  # the executor counts the one that it gave back, whose Finish comes with a step
    assert len(line.sent) == 3
    moved = link_pb2.Finish(handle=line.sent[1].handle, moved=True, status=link_pb2.LinkStatus(code=14))
    await line.step(finished=[moved], load=load(3))
    assert len(line.sent) == 3
    await line.step(finished=[link_pb2.Finish(handle=line.sent[0].handle)], load=load(4))
    assert len(line.sent) == 4
    await line.stop()


async def test_an_executor_hears_of_no_abort_of_a_sample_that_there_is_not_or_that_has_ended() -> None:
    line = ByHand(max_num_seqs=4)
    link = line.open("edge")
    await line.submit(link, 1, n=2)
    (submit,) = line.sent
    await line.step(finished_samples=[link_pb2.LinkSampleFinish(handle=submit.handle, index=0, reason=LENGTH)])
    told: list[tuple[object, ...]] = []
    line.replica._client.abort = lambda *what: told.append(what)
    for index in (0, 1, 2, 3, 2**32 - 1):
        abort = link_pb2.Abort(handle=1, index=index, reason=link_pb2.ABORT_REASON_STOP)
        line.dispatcher.intake.abort(link, abort)
    assert told == [(submit.handle, link_pb2.ABORT_REASON_STOP, 1)]
    line.dispatcher.intake.abort(link, link_pb2.Abort(handle=1))
    assert len(told) == 2
    await line.stop()


async def test_rows_of_samples_that_have_ended_count_no_longer() -> None:
    line = ByHand(max_num_seqs=4)
    link = line.open("edge")
    await line.submit(link, 1, b"many", n=4)
    (submit,) = line.sent
    assert line.placement.service[b"many"].num_rows == 4
    for index in range(3):
        await line.emit(submit.handle, 300, index)
        await line.step(finished_samples=[link_pb2.LinkSampleFinish(handle=submit.handle, index=index, reason=LENGTH)])
    assert line.placement.service[b"many"].num_rows == 1
    await line.submit(link, 2, b"few", n=3)
    assert not line.sent[1].in_place_of, "there were three rows"
    await line.step(finished=[link_pb2.Finish(handle=submit.handle)])
    assert b"many" not in line.placement.service
    await line.stop()
    assert line.placement.service.num_active == 0


async def test_rows_are_taken_from_the_next_tenant_where_the_one_with_most_rows_was_served_too_little() -> None:
    line = ByHand(max_num_seqs=5)
    link = line.open("edge")
    for handle in range(5):
        await line.submit(link, handle, b"newcomer" if handle < 3 else b"flood")
    for submit in line.sent:
        await line.emit(submit.handle, 4 if submit.tenant == b"newcomer" else 800)
    await line.submit(link, 5, b"quiet")
    assert [list(submit.in_place_of) for submit in line.sent[5:]] == [[line.sent[4].handle]]
    await line.stop()


async def test_requests_of_a_lost_executor_go_on_although_others_end_with_it() -> None:
    """Links of clients that named no model end with the last executor of a model while there is another model."""
    line = ByHand(max_num_seqs=4)
    unnamed, named = line.open("unnamed"), line.open("named", takes_any_model=False)
    await line.submit(unnamed, 1)
    await line.submit(named, 1)
    line.placement.on_executors_changed = line.dispatcher.intake.end_unnamed
    line.replica.on_down(GONE)
    assert not unnamed.requests
    assert list(line.placement.queue.in_order()) == [named.requests[1]]
    line.come(line.replica)
    await line.turns()
    assert len(line.sent) == 3
    await line.stop()


async def test_a_model_without_executors_makes_no_scheduler_unhealthy() -> None:
    line = ByHand(max_num_seqs=4)
    other = line.dispatchers._add()
    other.heartbeat.expect_work()  # its requests wait for an engine that starts again
    line.now = 100.0
    assert line.dispatchers.is_ready
    await line.submit(line.open("edge"), 1)
    line.now = 200.0
    assert not line.dispatchers.is_ready, "a ready executor does nothing"
    line.replica.on_down(GONE)
    line.come(line.replica)
    assert line.dispatchers.is_ready, "it may take as long again"
    await line.stop()


@pytest.mark.parametrize(("why", "limit"), [(GONE, 30.0), (STARTING, 120.0)])
def test_a_request_with_a_grammar_waits_no_longer_for_its_executors_than_any_other_for_all(why, limit) -> None:
    async def play() -> None:
        line = ByHand(max_num_seqs=4)
        able = line.add("by-hand:2", grammars=True)
        link = line.open("edge")
        ends = note_ends(link)
        await asyncio.sleep(1000.0)
        await line.submit(link, 1, grammar="start: /a/")
        able.on_step(link_pb2.StepOutput(handles=[1], indices=[0], offsets=[0], counts=[3], token_ids=[5] * 3))
        able.on_down(why)  # one runs there
        await line.submit(link, 2, grammar="start: /a/")
        await line.submit(link, 3)
        assert [submit.grammar for submit in line.sent] == ["start: /a/", ""]
        await asyncio.sleep(500.0)
        await line.submit(link, 4, grammar="start: /a/")
        assert {handle: when for handle, (when, _) in ends.items()} == {
            1: pytest.approx(1000.0 + limit, abs=0.01),
            2: pytest.approx(1000.0 + limit, abs=0.01),
            4: pytest.approx(1500.0, abs=0.01),
        }
        for _, status in ends.values():
            assert status.code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert status.retry_after_ns
            reasons = f"by-hand:1: ready, but without grammars; by-hand:2: {why.message}"
            assert status.message == f"structured_output: no executor that can keep to one is available ({reasons})"
        line.come(able, grammars=True)
        await line.submit(link, 5, grammar="start: /a/")
        assert len(line.sent) == 3
        await line.stop()

    run_virtually(play(), "")


def test_a_running_request_with_a_grammar_goes_on_when_its_executor_is_back() -> None:
    async def play() -> None:
        line = ByHand(max_num_seqs=4)
        able = line.add("by-hand:2", grammars=True)
        link = line.open("edge")
        await line.submit(link, 1, grammar="start: /a/")
        able.on_step(link_pb2.StepOutput(handles=[1], indices=[0], offsets=[0], counts=[3], token_ids=[5] * 3))
        able.on_down(GONE)
        await asyncio.sleep(29.0)
        line.come(able, grammars=True)
        await line.turns()
        assert [list(sample.token_ids) for sample in line.sent[1].resumed] == [[5, 5, 5]]
        await line.stop()

    run_virtually(play(), "")


async def test_requests_that_wait_for_executors_with_grammars_make_no_scheduler_unhealthy() -> None:
    line = ByHand(max_num_seqs=4)
    able = line.add("by-hand:2", grammars=True)
    link = line.open("edge")
    await line.submit(link, 1, grammar="start: /a/")
    able.on_down(STARTING)
    await line.turns()
    line.now = 100.0
    assert line.dispatchers.is_ready
    await line.submit(link, 2)
    assert line.dispatchers.is_ready
    line.now = 200.0
    assert not line.dispatchers.is_ready, "a ready executor does nothing"
    await line.step(finished=[link_pb2.Finish(handle=1)])
    assert list(link.requests) == [1]
    line.now = 300.0
    assert line.dispatchers.is_ready
    line.come(able, grammars=True)
    await line.turns()
    assert line.dispatchers.is_ready
    line.now = 400.0
    assert not line.dispatchers.is_ready
    await line.stop()


def test_where_all_executors_are_ready_and_none_takes_grammars_such_requests_are_refused() -> None:
    async def play() -> None:
        line = ByHand(max_num_seqs=4)
        able = line.add("by-hand:2", grammars=True)
        link = line.open("edge")
        ends = note_ends(link)
        able.leave()
        await line.submit(link, 1, grammar="start: /a/")
        await asyncio.sleep(29.0)
        assert not ends
        await asyncio.sleep(2.0)
        ((_, status),) = ends.values()
        assert (status.code, status.field) == (grpc.StatusCode.UNIMPLEMENTED.value[0], "structured_output")
        await line.stop()

    run_virtually(play(), "")
