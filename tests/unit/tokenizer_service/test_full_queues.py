"""A worker's handling of schedulers that have no room for a tenant."""

from __future__ import annotations

import grpc
import pytest

from fake_scheduler_link import Line, unconnected
from scalellm.services.common.errors import StatusError
from scalellm.v1 import link_pb2

SECOND = 10**9
FULL = StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the admission queue is full", retry_after=0.5).to_link()


async def refuse(line: Line, tenant: bytes, seconds: float) -> None:
    """A tenant sends a request, and its scheduler refuses it."""
    receiver = line.submit(tenant=tenant)
    (peer,) = (peer for peer in line.peers if peer.running)
    (handle,) = peer.running
    del peer.running[handle]
    finish = link_pb2.Finish(handle=handle, status=FULL, tenant_full_ns=int(seconds * SECOND))
    peer.link.on_step(link_pb2.StepOutput(finished=[finish]))
    line.schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)


def retry_after(line: Line, tenant: bytes) -> float | None:
    """Seconds that a refused caller is told; None: it is not refused."""
    try:
        line.schedulers.check_room(tenant)
    except StatusError as error:
        status = error.to_link()
        assert (status.code, status.message) == (FULL.code, FULL.message)
        return error.retry_after
    return None


def is_full(line: Line, tenant: bytes) -> bool:
    return retry_after(line, tenant) is not None


async def test_it_holds_for_its_tenant_and_time() -> None:
    with unconnected():
        line = Line()
        await line.peers[0].come_up()
        assert not is_full(line, b"loud")
        await refuse(line, b"loud", 0.2)
        assert is_full(line, b"loud")
        assert not is_full(line, b"quiet"), "nothing is concluded for others"
        line.now += int(0.2 * SECOND)
        assert not is_full(line, b"loud")


async def test_a_refusal_of_one_request_says_nothing_of_the_next() -> None:
    with unconnected():
        line = Line()
        await line.peers[0].come_up()
        await refuse(line, b"loud", 0.0)
        assert not is_full(line, b"loud")


@pytest.mark.parametrize("loses", [False, True])
async def test_all_schedulers_have_to_be_full(loses: bool) -> None:
    with unconnected():
        line = Line(2)
        for peer in line.peers:
            await peer.come_up()
        await refuse(line, b"loud", 10.0)  # by the one to which this prompt belongs
        assert not is_full(line, b"loud")
        (full,) = (peer for peer in line.peers if peer.submits)
        (other,) = (peer for peer in line.peers if not peer.submits)
        if loses:
            other.die()
            assert is_full(line, b"loud")
            full.die()
            await full.come_up()
            assert not is_full(line, b"loud"), "who comes back has an empty queue"
        else:
            full.link.stop_submitting("leaves")
            await refuse(line, b"loud", 10.0)
            assert is_full(line, b"loud")


async def serve(line: Line, tenant: bytes) -> None:
    """A tenant's request is answered."""
    receiver = line.submit(tenant=tenant)
    (peer,) = (peer for peer in line.peers if peer.running)
    (handle,) = peer.running
    del peer.running[handle]
    peer.link.on_step(link_pb2.StepOutput(finished=[link_pb2.Finish(handle=handle)]))
    line.schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)


async def test_refused_callers_come_back_at_twice_the_rate_at_which_requests_end() -> None:
    with unconnected():
        line = Line()
        await line.peers[0].come_up()
        await refuse(line, b"loud", 1000.0)
        assert {retry_after(line, b"loud") for _ in range(10)} == {0.5}, "nothing has ended so far"
        for _ in range(40):
            line.now += SECOND // 10
            await serve(line, b"loud")
        line.now += SECOND // 10
        told = [retry_after(line, b"loud") or 0.0 for _ in range(1500)]
        # 20 a second for all of 60 s; the others begin again, and none is told a time beyond.
        for second in range(1, 60):
            assert sum(second <= seconds < second + 1 for seconds in told[:1190]) in (19, 20, 21)
        assert told[0] == 0.5
        assert max(told) <= 60.0
        assert 15.0 <= told[-1] <= 17.0
        assert retry_after(line, b"quiet") is None


async def test_more_callers_than_can_be_told_apart_share_the_time() -> None:
    with unconnected():
        line = Line()
        await line.peers[0].come_up()
        await refuse(line, b"loud", 1000.0)
        for _ in range(4):
            line.now += 10 * SECOND
            await serve(line, b"loud")
        told = [retry_after(line, b"loud") for _ in range(100)]
        assert all(seconds is not None and 0.5 <= seconds <= 60.0 for seconds in told)
        assert len(set(told)) >= 12


async def test_nothing_is_kept_of_what_is_over() -> None:
    with unconnected():
        line = Line()
        await line.peers[0].come_up()
        for number in range(100):
            tenant = b"%d" % number
            await refuse(line, tenant, 0.1)
            line.now += SECOND
            assert not is_full(line, tenant)
        assert not line.schedulers._full._full
        assert len(line.schedulers._full._returns) <= 61
        line.now += 61 * SECOND
        await serve(line, tenant)
        await refuse(line, b"loud", 0.1)
        assert list(line.schedulers._full._returns) == [b"loud"]


async def test_each_refusal_is_its_own() -> None:
    """An error that several calls raise would gather the frames of all of them."""
    with unconnected():
        line = Line()
        await line.peers[0].come_up()
        await refuse(line, b"loud", 10.0)
        errors = []
        for _ in range(2):
            with pytest.raises(StatusError) as error:
                line.schedulers.check_room(b"loud")
            errors.append(error.value)
        assert errors[0] is not errors[1]
