"""Requests whose schedulers are lost: whatever breaks where, a receiver gets what it would have got undisturbed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_scheduler_link import LENGTH, PROMPT, Line, Taker, logprob, token, unconnected, welcome
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.running_request import Move
from scalellm.v1 import common_pb2, link_pb2


@pytest.fixture(autouse=True)
def _no_connections() -> Iterator[None]:
    with unconnected():
        yield


async def started(num_schedulers: int = 1, **options) -> Line:
    line = Line(num_schedulers, **options)
    for peer in line.peers:
        await peer.come_up()
    return line


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 1), st.integers(1, 4), st.integers(0, 3)),
    st.tuples(st.sampled_from(["die", "give back", "come up"]), st.integers(0, 1)),
    st.tuples(st.just("take"), st.integers(0, 2)),
    st.tuples(st.just("stop"), st.integers(0, 2), st.integers(0, 1)),
)


@given(st.lists(ACTIONS, max_size=40))
def test_whatever_breaks_a_receiver_gets_each_token_and_logprob_once(actions) -> None:
    asyncio.run(play(actions))


async def play(actions) -> None:
    line = Line(2)
    for peer in line.peers:
        await peer.come_up()
    takers = [
        Taker(line.submit(1)),
        Taker(line.submit(2, logprobs=0)),
        Taker(line.submit(2, logprobs=0, prompt_logprobs=0)),
    ]
    stopped: set[tuple[int, int]] = set()
    for action in actions:
        match action:
            case ("step", number, chunk, replay):
                if line.peers[number].is_up:
                    line.peers[number].step(chunk, replay)
            case ("die", number):
                line.peers[number].die()
            case ("give back", number):
                if line.peers[number].is_up:
                    line.peers[number].give_back()
            case ("come up", number):
                if not line.peers[number].is_up:
                    await line.peers[number].come_up()
            case ("take", number):
                takers[number].take()
            case ("stop", number, index):
                receiver = takers[number].receiver
                if index < len(receiver.progress.tokens) and receiver.progress.tokens[index]:
                    stopped.add((number, index))
                    line.schedulers.stop_sample(receiver, index)
    for peer in line.peers:
        peer.die()
        await peer.come_up()
    failed = [number for number, taker in enumerate(takers) if taker.receiver._error is not None]
    for number in failed:  # only where one scheduler after the other was lost
        assert "schedulers in a row were lost" in takers[number].receiver._error.message
    for _ in range(len(PROMPT) + LENGTH):
        for peer in line.peers:
            peer.step()
    for number, taker in enumerate(takers):
        if number in failed:
            continue
        assert taker.receiver.finish is not None
        assert taker.receiver.finish.status.code == 0
        taker.take()
        for index in range(len(taker.receiver.progress.tokens)):
            count = len(taker.tokens[index])
            assert taker.tokens[index] == [token(index, place) for place in range(count)]
            assert count == LENGTH or (number, index) in stopped
            if number:
                assert taker.logprobs[index] == [logprob(index, place) for place in range(count)]
            assert taker.num_ends[index] == 1 or (number, index) in stopped
        assert taker.prompt == ([logprob(0, place) for place in range(len(PROMPT))] if number == 2 else [])
    for taker in takers:
        line.schedulers.release(taker.receiver, link_pb2.ABORT_REASON_CANCELLED)
    assert line.schedulers.num_waiting == 0
    assert not line.schedulers._requests
    ids = {submit.execution_id for submit in line.submits}
    assert len(ids) == len(takers)
    for execution_id in ids:
        attempts = [submit.attempt for submit in line.submits if submit.execution_id == execution_id]
        assert sorted(attempts) == list(range(len(attempts)))
    assert sum(line.schedulers.num_resubmitted.values()) == len(line.submits) - len(takers)


async def error_of(receiver) -> StatusError:
    with pytest.raises(StatusError) as error:
        await receiver.wait()
    return error.value


async def test_the_same_scheduler_goes_on_when_it_is_back():
    line = await started()
    (peer,) = line.peers
    receiver = line.submit(2, seconds=60, seed=7)
    peer.step(3)
    peer.die()
    assert line.schedulers.num_waiting == 1
    line.now += 2 * 10**9
    await peer.come_up()
    first, second = peer.submits
    assert (first.attempt, second.attempt) == (0, 1)
    assert first.execution_id == second.execution_id
    assert len(first.execution_id) == 16
    assert not first.resumed
    assert [list(sample.token_ids) for sample in second.resumed] == [
        [token(index, p) for p in range(3)] for index in (0, 1)
    ]
    assert second.time_remaining_ns == first.time_remaining_ns - 2 * 10**9
    assert second.sampling == first.sampling
    for _ in range(LENGTH):
        peer.step()
    assert receiver.finish.timings.failover_ns == 2 * 10**9
    assert (line.schedulers.num_resubmitted, line.schedulers.num_waiting) == ({Move.LOST: 1, Move.GIVEN_BACK: 0}, 0)
    assert list(line.schedulers.num_sent.values()) == [2]


async def test_what_goes_to_which_scheduler_is_counted():
    line = await started(2)
    one, two = line.peers
    receivers = [line.submit(1, seed=seed) for seed in range(8)]
    sent = [len(peer.submits) for peer in line.peers]
    schedulers = line.schedulers
    assert list(schedulers.num_sent.values()) == list(schedulers.num_running.values()) == sent
    one.give_back()
    assert list(schedulers.num_running.values()) == [0, 8]
    assert schedulers.num_resubmitted == {Move.LOST: 0, Move.GIVEN_BACK: sent[0]}
    assert list(schedulers.num_sent.values()) == [sent[0], 8]
    for receiver in receivers:
        schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
    two.die()
    assert list(schedulers.num_running.values()) == [0, 0]


async def test_prompt_logprobs_that_have_come_are_not_asked_for_again():
    line = await started()
    (peer,) = line.peers
    taker = Taker(line.submit(1, prompt_logprobs=0))
    peer.step(2)
    peer.die()
    await peer.come_up()
    peer.step(len(PROMPT))
    taker.take()
    assert taker.prompt == [logprob(0, place) for place in range(len(PROMPT))]
    peer.die()
    await peer.come_up()
    assert [submit.sampling.HasField("prompt_logprobs") for submit in peer.submits] == [True, True, False]
    peer.step(LENGTH)
    taker.take()
    assert taker.prompt == [logprob(0, place) for place in range(len(PROMPT))]
    assert taker.receiver.finish.status.code == 0


async def test_samples_that_a_stop_text_ended_stay_ended():
    line = await started()
    (peer,) = line.peers
    receiver = line.submit(2)
    peer.step(3)
    line.schedulers.stop_sample(receiver, 1)
    peer.die()
    await peer.come_up()
    resumed = {sample.index: sample.finished for sample in peer.submits[-1].resumed}
    assert resumed == {0: common_pb2.FINISH_REASON_UNSPECIFIED, 1: common_pb2.FINISH_REASON_STOP}
    peer.die()
    line.schedulers.stop_sample(receiver, 0)  # found in what had come, while no scheduler is there
    assert receiver.finish.status.code == 0
    assert receiver.finish.usage == common_pb2.Usage(prompt_tokens=len(PROMPT), completion_tokens=6, num_resumed=6)
    assert line.schedulers.num_waiting == 0


async def test_what_is_given_back_goes_to_another_one_and_nothing_new_comes_to_who_gave_it():
    line = await started(2)
    for _ in range(8):
        line.submit()
    victim, other = sorted(line.peers, key=lambda peer: -len(peer.running))
    victim.step(2)
    num_moved = len(victim.running)
    assert num_moved
    victim.give_back()
    assert [submit.attempt for submit in other.submits[-num_moved:]] == [1] * num_moved
    before = len(victim.submits)
    for number in range(16):
        line.submit(session=f"s{number}")
    assert len(victim.submits) == before
    assert line.schedulers.num_up == 1
    victim.die()
    await victim.come_up()
    for number in range(16):
        line.submit(session=f"s{number}")
    assert len(victim.submits) > before


async def test_requests_with_the_same_beginning_or_session_meet_on_one_scheduler():
    line = await started(4)
    for _ in range(8):
        line.submit()
    assert sorted(len(peer.submits) for peer in line.peers) == [0, 0, 0, 8]
    chosen = {}
    for number in range(32):
        for _ in range(2):
            line.submit(session=f"s{number}")
            (peer,) = [peer for peer in line.peers if peer.submits and peer.submits[-1].session_id == f"s{number}"]
            assert chosen.setdefault(number, peer) is peer
    assert len({id(peer) for peer in chosen.values()}) == 4
    # Only what belonged to the one that is lost moves.
    victim = chosen[0]
    victim.die()
    for number, peer in chosen.items():
        before = len(peer.submits)
        line.submit(session=f"s{number}")
        assert (len(peer.submits) > before) == (peer is not victim)


async def test_without_any_scheduler_a_request_ends_after_the_limit(monkeypatch):
    line = await started(outage_limit=0.01)
    receiver = line.submit()
    line.peers[0].die()
    error = await error_of(receiver)
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.message == "no scheduler took the request for 0.01 s after its own was lost: killed"
    assert error.retry_after == 1.0
    await line.peers[0].come_up()
    assert len(line.submits) == 1


async def test_a_request_waits_no_longer_than_its_deadline():
    line = await started()
    receiver = line.submit(seconds=0.01)
    line.now += 10**7 - 10
    line.peers[0].die()
    error = await error_of(receiver)  # of a timer that fires before the clock has come so far
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.message == "the deadline passed while no scheduler could be reached"
    assert line.schedulers.num_waiting == 0


async def test_another_model_takes_over_no_request():
    line = await started(2)
    receiver = line.submit()
    (peer,) = [peer for peer in line.peers if peer.running]
    (other,) = [other for other in line.peers if other is not peer]
    other.die()
    await other.come_up(welcome("n"))
    peer.die()
    assert not receiver.is_over  # its own may come back
    await peer.come_up(welcome("n"))
    error = await error_of(receiver)
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert error.message.startswith("the request began with model 'm', which is served no more: 127.0.0.1:1 serves 'n'")
    assert line.schedulers.num_waiting == 0


async def test_a_scheduler_that_comes_back_with_another_tokenizer_ends_the_wait():
    line = await started()
    receiver = line.submit()
    line.peers[0].die()
    line.peers[0].die(StatusError(grpc.StatusCode.FAILED_PRECONDITION, "tokenizer_sha256: another one"))
    assert (await error_of(receiver)).message.endswith("which is served no more: tokenizer_sha256: another one")


async def test_a_request_that_kills_every_scheduler_ends():
    line = await started()
    (peer,) = line.peers
    harmless, harmful = line.submit(), line.submit()
    for _ in range(5):
        peer.running.pop(2 if harmful.is_over else max(peer.running))
        peer.step()
        peer.die()
        await peer.come_up()
    error = await error_of(harmful)
    assert error.code is grpc.StatusCode.INTERNAL
    assert error.message == "5 schedulers in a row were lost with this request, the last one: killed"
    assert not harmless.is_over


async def test_released_requests_are_neither_sent_again_nor_remembered():
    line = await started()
    (peer,) = line.peers
    waiting, running = line.submit(), line.submit()
    peer.die()
    line.schedulers.release(waiting, link_pb2.ABORT_REASON_CANCELLED)
    await peer.come_up()
    assert len(peer.submits) == 3
    line.schedulers.release(running, link_pb2.ABORT_REASON_CANCELLED)
    assert peer.aborts == [(peer.submits[-1].handle, link_pb2.ABORT_REASON_CANCELLED, None)]
    assert line.schedulers.num_handles == 1  # until its Finish
    peer.step()
    assert line.schedulers.counts.discarded_tokens == 1
    peer.step(LENGTH)
    assert line.schedulers.num_handles == 0


async def test_a_worker_that_stops_says_so():
    line = await started()
    receivers = [line.submit(), line.submit()]
    line.peers[0].die()
    line.schedulers.end_all("the server is shutting down")
    for receiver in receivers:
        assert (await error_of(receiver)).message == "the server is shutting down"
        line.schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
    assert line.schedulers.num_waiting == 0


async def test_a_scheduler_whose_name_stands_for_it_no_more_is_forgotten_once_it_is_down():
    line = await started(2)
    first, second = line.peers
    line.schedulers.drop_when_down(first.link.address)
    assert line.schedulers.num_up == 2
    first.die()
    await second.come_up()
    assert list(line.schedulers._links) == [second.link.address]


async def test_the_shortest_context_counts():
    line = Line(2)
    for peer, length in zip(line.peers, (100, 50), strict=True):
        await peer.come_up(welcome(max_model_len=length))
    assert line.schedulers.welcome.max_model_len == 50
