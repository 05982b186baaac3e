"""Handles, frames that make no sense, and links that go away."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from scalellm.v1 import common_pb2, link_pb2, scheduler_pb2
from service_processes import PATIENCE
from services.common.api_keys import Tenant
from services.common.errors import StatusError
from services.common.link import LinkClient
from services.tokenizer.generation.edge import cache_salt
from services.tokenizer.scheduler_link import SchedulerLink

WELCOME = link_pb2.Welcome(model="m", max_model_len=100)
OK = 0
CONNECT = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].methods_by_name["Connect"]


def make_link(*, up: bool = True) -> SchedulerLink:
    link = SchedulerLink("127.0.0.1:1", "test", b"", clock=lambda: 1)
    if up:
        link.on_up(WELCOME)
    return link


def submit(link: SchedulerLink):
    return link.submit(link_pb2.Submit(sampling=common_pb2.SamplingParams(n=1)))


def finish(link: SchedulerLink, *handles: int) -> None:
    link.on_step(link_pb2.StepOutput(finished=[link_pb2.Finish(handle=handle) for handle in handles]))


async def test_a_handle_is_kept_until_its_finish():
    link = make_link()
    link._last_handle = 2**32 - 2
    first, second = submit(link), submit(link)
    assert (first.handle, second.handle) == (2**32 - 1, 1)
    link.release(first, link_pb2.ABORT_REASON_CANCELLED)
    assert link.num_handles == 2
    link._last_handle = 2**32 - 2
    assert submit(link).handle == 2  # both are still taken
    finish(link, 2**32 - 1, 1, 2, 77)
    assert link.num_handles == 0
    assert second.finish is not None
    assert first.finish is None


async def test_released_requests_hear_nothing():
    link = make_link()
    receiver = submit(link)
    link.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
    link.on_step(link_pb2.StepOutput(handles=[receiver.handle], indices=[0], offsets=[0], counts=[1], token_ids=[5]))
    assert receiver.take() == []


async def test_a_lost_link_ends_its_requests():
    link = make_link()
    receiver = submit(link)
    link.on_down(StatusError.unavailable("gone"))
    with pytest.raises(StatusError, match="the link to the scheduler broke: gone") as error:
        await receiver.wait()
    assert error.value.retry_after == 1.0
    assert link.num_handles == 0
    with pytest.raises(StatusError, match="the scheduler cannot be reached: gone"):
        submit(link)


async def test_requests_wait_for_the_link():
    link = make_link(up=False)
    waiting = asyncio.create_task(link.wait_up(PATIENCE))
    await asyncio.sleep(0)
    link.on_up(WELCOME)
    assert (await waiting).model == "m"
    link.on_down(StatusError(grpc.StatusCode.FAILED_PRECONDITION, "another tokenizer"))
    with pytest.raises(StatusError, match="another tokenizer") as error:
        await link.wait_up(0.0)
    assert error.value.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_draining_scheduler_gets_nothing_new():
    link = make_link()
    running = submit(link)
    link.on_step(link_pb2.StepOutput(load=link_pb2.Load(draining=True)))
    with pytest.raises(StatusError, match="it is shutting down"):
        submit(link)
    finish(link, running.handle)
    assert running.finish is not None


async def test_a_scheduler_without_model_is_refused():
    with pytest.raises(StatusError, match="no executor yet"):
        make_link(up=False).on_up(link_pb2.Welcome())


class EndedCall:
    """A call that the peer has ended while a write is due."""

    async def write(self, frame):
        raise asyncio.InvalidStateError("RPC already finished.")

    async def code(self):
        return grpc.StatusCode.UNAVAILABLE

    async def details(self):
        return "gone"


async def test_a_write_after_the_end_tells_why_the_link_ended():
    client = LinkClient("host:1", CONNECT, link_pb2.Hello(), make_link())
    client._up = True
    client.abort(1, link_pb2.ABORT_REASON_CANCELLED)
    with pytest.raises(StatusError, match="host:1: gone"):
        await client._write(EndedCall())


def test_salts():
    assert cache_salt("") == cache_salt("")
    assert len({cache_salt(""), cache_salt("one"), cache_salt("two"), cache_salt("one", Tenant("other"))}) == 4
    assert all(len(cache_salt(secret)) == 16 for secret in ("", "one"))
    acme, other = Tenant("acme"), Tenant("other")
    salts = [cache_salt("s", tenant, said) for tenant in (acme, other) for said in ("", "acme", "other", "x")]
    assert len(set(salts)) == len(salts)
    assert cache_salt("s", acme, "x") == cache_salt("s", acme, "x")
