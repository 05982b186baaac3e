"""Answers that are not taken and requests that do not end: what they hold is bounded, and costs no neighbour."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

import grpc
import pytest
from hyperframe.frame import SettingsFrame

from raw_http2 import connect
from scalellm.services.common.api_keys import Tenant, TenantLimits
from scalellm.services.common.lifecycle import GrpcService
from scalellm.services.tokenizer.call_bytes import CallBytes
from scalellm.services.tokenizer.quotas import TenantQuotas
from scalellm.services.tokenizer.rpc import CallGate, add_service
from scalellm.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from service_processes import PATIENCE, eventually

SERVICE = tokenizer_pb2.DESCRIPTOR.services_by_name["Tokenizer"]
DECODE = "/scalellm.v1.Tokenizer/Decode"
ANSWER = 2**20
MIB = 2**20


class Servicer:
    """Decodes as many bytes as the first token id says."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def Decode(self, request: tokenizer_pb2.DecodeRequest, context: grpc.aio.ServicerContext) -> object:
        self.num_calls += 1
        return tokenizer_pb2.DecodeResponse(text="x" * request.token_ids[0])

    Encode = ApplyChatTemplate = GetInfo = Decode


class Recognition(grpc.aio.ServerInterceptor):
    """Knows tenants by their metadata."""

    def __init__(self) -> None:
        self._name: ContextVar[str] = ContextVar("name")

    async def intercept_service(self, continuation, details):
        self._name.set(dict(details.invocation_metadata)["tenant"])
        return await continuation(details)

    def tenant(self) -> Tenant:
        name = self._name.get()
        return Tenant(name, TenantLimits(concurrent_requests=2 if name == "small" else None))


class Worker:
    """The edge's calls in front of a servicer."""

    def __init__(self, **limits: int | float) -> None:
        self.servicer = Servicer()
        self.quotas = TenantQuotas(None, "worker")
        self.held = CallBytes(**limits)  # type: ignore[arg-type]
        self.gate = CallGate()
        self.codes: list[grpc.StatusCode] = []
        recognition = Recognition()
        self.service = GrpcService("127.0.0.1", 0, services=[], is_ready=lambda: True, interceptors=(recognition,))
        add_service(
            self.service.server,
            SERVICE,
            self.servicer,
            self.gate,
            lambda method, code: self.codes.append(code),
            self.held,
            recognition.tenant,
            self.quotas.admitted,
        )


@asynccontextmanager
async def serving(**limits: int | float) -> AsyncIterator[Worker]:
    worker = Worker(**limits)
    await worker.service.start()
    try:
        yield worker
    finally:
        await worker.service.stop(0)


async def decode(worker: Worker, tenant: str, size: int = ANSWER) -> str:
    async with grpc.aio.insecure_channel(
        worker.service.address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        stub = tokenizer_pb2_grpc.TokenizerStub(channel)
        request = tokenizer_pb2.DecodeRequest(token_ids=[size])
        answer = await stub.Decode(request, metadata=(("tenant", tenant),), timeout=PATIENCE)
        return answer.text


def request(size: int = ANSWER) -> bytes:
    return tokenizer_pb2.DecodeRequest(token_ids=[size]).SerializeToString()


async def test_an_answer_that_is_not_taken_holds_its_tenants_place() -> None:
    async with serving() as worker:
        no_window = {SettingsFrame.INITIAL_WINDOW_SIZE: 0}
        async with connect(worker.service.address, no_window) as client:
            streams = [await client.call(DECODE, request(), (("tenant", "small"),)) for _ in range(40)]
            await eventually(lambda: len(worker.codes) == 38)
            assert set(worker.codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert worker.servicer.num_calls == 2
            assert 2 * ANSWER <= worker.held.num_bytes < 3 * ANSWER
            assert len(await decode(worker, "other")) == ANSWER, "a neighbour is served"
            waiting = [stream for stream in streams if not client.answers[stream].ended.is_set()]
            for stream in waiting:
                client.grant(stream, 2 * ANSWER)
                answer = await client.answer(stream)
                assert (answer.code, len(answer.messages)) == (grpc.StatusCode.OK, 1)
        await eventually(lambda: worker.held.num_bytes == 0)
        assert len(await decode(worker, "small")) == ANSWER


async def test_the_bytes_of_a_connection_and_of_a_tenant_are_bounded() -> None:
    limits = {"max_connection_bytes": 4 * MIB, "max_tenant_bytes": 6 * MIB}
    async with serving(**limits) as worker:
        no_window = {SettingsFrame.INITIAL_WINDOW_SIZE: 0}
        async with connect(worker.service.address, no_window) as one, connect(worker.service.address, no_window) as two:
            for client, num_refused in ((one, 7), (two, 8)):
                before = len(worker.codes)
                streams = [await client.call(DECODE, request(), (("tenant", "many"),)) for _ in range(10)]
                await eventually(lambda before=before, more=num_refused: len(worker.codes) == before + more)
                refused = [client.answers[stream] for stream in streams if client.answers[stream].headers]
                details = {answer.details for answer in refused if answer.code is not None}
                whose = "on this connection " if client is one else ""
                assert all(f"answers of tenant 'many' {whose}hold " in text for text in details), details
            assert 5 * ANSWER <= worker.held.num_bytes <= 6 * MIB
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await decode(worker, "many", 2 * ANSWER)
            assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(await decode(worker, "other", 2 * ANSWER)) == 2 * ANSWER
        await eventually(lambda: worker.held.num_bytes == 0)  # the connections are gone
        assert len(await decode(worker, "many")) == ANSWER


async def test_uploads_that_do_not_end_are_few_and_end() -> None:
    async with serving(read_limit=1.0) as worker:
        async with connect(worker.service.address) as client:
            streams = [client.open(DECODE, (("tenant", "many"),)) for _ in range(100)]
            assert len(await decode(worker, "many")) == ANSWER, "another connection of the same tenant is read"
            for stream in streams:
                answer = await asyncio.wait_for(client.answer(stream), PATIENCE)
                assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
                assert answer.details == "request: was not complete within 1 s"
        assert worker.servicer.num_calls == 1
        assert worker.held.num_bytes == 0
