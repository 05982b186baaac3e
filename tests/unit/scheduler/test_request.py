"""Request: the parts of its time add up, resubmissions carry exactly what the client has."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import LONGEST_NS
from scalellm.services.scheduler.request import Request, RequestState
from scalellm.v1 import common_pb2, link_pb2


def make_request(now=0.0, **fields):
    sampling = common_pb2.SamplingParams(n=fields.pop("n", 1))
    submit = link_pb2.Submit(handle=7, token_ids=[1, 2, 3], sampling=sampling, **fields)
    finishes = []
    request = Request(SimpleNamespace(add_sample_finish=finishes.append, finishes=finishes), submit, 1, now)
    request.check()
    return request


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.sampled_from(["lost", "sent back"])), max_size=5))
def test_admission_failover_and_the_last_executor_are_the_whole_life(stints):
    request = make_request()
    now, lost_time, waits = 0.0, 0.0, 0.0
    was_lost = False
    for wait, run, how in stints:
        now += wait
        request.start(SimpleNamespace(), 1, now)
        lost_time, waits = (lost_time + wait, waits) if was_lost else (lost_time, waits + wait)
        now += run
        was_lost = how == "lost"
        request.requeue(lost=was_lost)
        lost_time, waits = (lost_time + run, waits) if was_lost else (lost_time, waits + run)
    now += 1.0
    request.start(SimpleNamespace(), 1, now)
    lost_time, waits = (lost_time + 1.0, waits) if was_lost else (lost_time, waits + 1.0)
    now += 2.0
    request.end(now)
    timings = link_pb2.HopTimings()
    request.times.fill(timings, now)
    assert timings.admission_ns == pytest.approx(waits * 1e9, abs=1000)
    assert timings.failover_ns == pytest.approx(lost_time * 1e9, abs=1000)
    assert timings.scheduler_total_ns == pytest.approx(timings.admission_ns + timings.failover_ns + 2e9, abs=1000)


def test_states():
    request = make_request()
    with pytest.raises(AssertionError):
        request.requeue(lost=True)
    request.start(SimpleNamespace(), 1, 1.0)
    with pytest.raises(AssertionError):
        request.start(SimpleNamespace(), 1, 1.0)
    request.end(2.0)
    assert request.state is RequestState.ENDED
    with pytest.raises(AssertionError):
        request.end(3.0)


def test_a_submit_forwards_the_time_that_is_left():
    request = make_request(now=100.0, time_remaining_ns=5_000_000_000)
    assert request.deadline == 105.0
    assert request.make_submit(103.5, 3).time_remaining_ns == 1_500_000_000
    assert request.make_submit(109.0, 3).time_remaining_ns == 0
    assert not make_request().make_submit(5.0, 3).HasField("time_remaining_ns")


def test_a_resubmission_carries_each_sample():
    request = make_request(n=3)
    request.client.emitted[0] += [11, 12]
    request.client.emitted[2] += [31]
    request.client.progress.end_sample(2, common_pb2.FINISH_REASON_LENGTH)
    submit = request.make_submit(0.0, 3)
    assert [(s.index, list(s.token_ids), s.finished) for s in submit.resumed] == [
        (0, [11, 12], common_pb2.FINISH_REASON_UNSPECIFIED),
        (2, [31], common_pb2.FINISH_REASON_LENGTH),
    ]
    assert request.executor.num_resumed == 3
    assert len(request.make_submit(0.0, 3).resumed) == 2


def test_a_request_that_ran_before_goes_on():
    request = make_request(n=2, resumed=[link_pb2.ResumedSample(index=1, token_ids=[5, 6])])
    assert request.client.emitted == [[], [5, 6]]
    with pytest.raises(StatusError, match=r"resumed\.index: 2 is not below sampling.n = 2"):
        make_request(n=2, resumed=[link_pb2.ResumedSample(index=2)])


def test_samples_that_were_to_stop_end_when_nobody_is_left_to_do_it():
    request = make_request(n=2)
    request.client.request_end(link_pb2.Abort(handle=7, index=1, reason=link_pb2.ABORT_REASON_STOP))
    request.client.request_end(link_pb2.Abort(handle=7, index=9, reason=link_pb2.ABORT_REASON_STOP))
    request.client.settle_stopping()
    assert [(f.handle, f.index, f.reason) for f in request.client.link.finishes] == [
        (7, 1, common_pb2.FINISH_REASON_STOP)
    ]
    assert not request.client.progress.all_ended
    request.client.request_end(link_pb2.Abort(handle=7, reason=link_pb2.ABORT_REASON_STOP))
    request.client.settle_stopping()
    assert request.client.progress.all_ended
    assert len(request.client.link.finishes) == 2


def test_the_longest_time_remaining_goes_on_to_an_executor():
    request = make_request(time_remaining_ns=LONGEST_NS)
    assert request.make_submit(0.0, 3).time_remaining_ns == LONGEST_NS
    with pytest.raises(StatusError, match="time_remaining_ns: must be at most"):
        make_request(time_remaining_ns=2**64 - 1)


def test_fields_that_this_version_does_not_know_go_on_to_the_executor():
    submit = link_pb2.Submit(handle=7, token_ids=[1, 2, 3], resumed=[link_pb2.ResumedSample(token_ids=[4])])
    unknown = b"\xaa\x3f\x02ab"  # field 1013, of two bytes
    request = Request(SimpleNamespace(), link_pb2.Submit.FromString(submit.SerializeToString() + unknown), 1, 0.0)
    request.check()
    frame = link_pb2.ClientFrame(submit=request.make_submit(0.0, 3))
    assert unknown in frame.SerializeToString()
