"""What a worker makes of schedulers that have no room for a tenant."""

from __future__ import annotations

import grpc
import pytest

from fake_scheduler_link import Line, unconnected
from scalellm.v1 import link_pb2
from services.common.errors import StatusError

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


def is_full(line: Line, tenant: bytes) -> bool:
    try:
        line.schedulers.check_room(tenant)
    except StatusError as error:
        return error.to_link() == FULL
    return False


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
