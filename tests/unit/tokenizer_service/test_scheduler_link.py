"""One worker's links to its schedulers: up, down, draining, refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest

from fake_scheduler_link import LENGTH, Line, unconnected, welcome
from scalellm.services.common.api_keys import DEFAULT_TENANT, Tenant
from scalellm.services.common.errors import StatusError
from scalellm.services.common.link import LinkClient
from scalellm.services.tokenizer.generation.edge import TenantSalt
from scalellm.v1 import link_pb2, scheduler_pb2
from service_processes import PATIENCE

CONNECT = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].methods_by_name["Connect"]


@pytest.fixture(autouse=True)
def _no_connections() -> Iterator[None]:
    with unconnected():
        yield


async def test_released_requests_hear_nothing():
    line = Line()
    await line.peers[0].come_up()
    receiver = line.submit()
    line.schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
    line.peers[0].step()
    assert receiver.take() == []


async def test_a_request_that_ends_before_its_submit_left_needs_no_finish():
    line = Line()
    await line.peers[0].come_up()
    link = line.peers[0].link
    client = link._client
    del client.submit, client.abort  # the peer's, which reads
    client._up = True
    receiver = line.submit()
    assert (len(client._outbox), link.num_handles) == (1, 1)
    line.schedulers.release(receiver, link_pb2.ABORT_REASON_CANCELLED)
    assert (len(client._outbox), link.num_handles) == (0, 0)


async def test_requests_wait_for_a_scheduler():
    line = Line()
    waiting = asyncio.create_task(line.schedulers.wait_up(PATIENCE))
    await asyncio.sleep(0)
    await line.peers[0].come_up()
    assert (await waiting).model == "m"
    line.peers[0].die()
    with pytest.raises(StatusError, match="the scheduler cannot be reached: killed") as error:
        line.submit()
    assert error.value.retry_after == 1.0
    line.peers[0].die(StatusError(grpc.StatusCode.FAILED_PRECONDITION, "another tokenizer"))
    with pytest.raises(StatusError, match="another tokenizer") as error:
        await line.schedulers.wait_up(0.0)
    assert error.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert line.peers[0].link._client._hello.unserved == 1  # what the next attempt to connect tells


async def test_a_draining_scheduler_gets_nothing_new_and_finishes_what_it_has():
    line = Line()
    (peer,) = line.peers
    await peer.come_up()
    running = line.submit()
    peer.link.on_step(link_pb2.StepOutput(load=link_pb2.Load(draining=True)))
    with pytest.raises(StatusError, match="127.0.0.1:1 is shutting down"):
        line.submit()
    peer.step(LENGTH)
    assert running.finish is not None


async def test_a_scheduler_without_model_is_refused():
    with pytest.raises(StatusError, match="no executor yet"):
        Line().peers[0].link.on_up(welcome(model=""))


class EndedCall:
    """A call that the peer has ended while a write is due."""

    async def write(self, frame):
        raise asyncio.InvalidStateError("RPC already finished.")

    async def code(self):
        return grpc.StatusCode.UNAVAILABLE

    async def details(self):
        return "gone"

    async def trailing_metadata(self):
        return ()


async def test_a_write_after_the_end_tells_why_the_link_ended():
    client = LinkClient("host:1", CONNECT, link_pb2.Hello(), Line().peers[0].link)
    client._up = True
    client.abort(1, link_pb2.ABORT_REASON_CANCELLED)
    with pytest.raises(StatusError, match="host:1: gone"):
        await client._write(EndedCall())


def salt_of(secret: str, tenant: Tenant = DEFAULT_TENANT, said: str = "") -> bytes:
    return TenantSalt(secret, tenant).of_request(said)


def test_salts():
    assert salt_of("") == salt_of("")
    assert len({salt_of(""), salt_of("one"), salt_of("two"), salt_of("one", Tenant("other"))}) == 4
    assert all(len(salt_of(secret)) == 16 for secret in ("", "one"))
    acme, other = Tenant("acme"), Tenant("other")
    salts = [salt_of("s", tenant, said) for tenant in (acme, other) for said in ("", "acme", "other", "x")]
    assert len(set(salts)) == len(salts)
    assert salt_of("s", acme, "x") == salt_of("s", acme, "x")
