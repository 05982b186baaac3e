"""Input that costs more than it looks, before anybody checks it, is refused, forgotten and not logged."""

from __future__ import annotations

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from line import Line, generate, start_line
from raw_http2 import connect
from scalellm.services.tokenizer.limits import RequestLimits
from scalellm.v1 import common_pb2, generation_pb2
from service_processes import PATIENCE, ServiceProcess, Spawn

FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "512")
MAX_REQUEST_BYTES = RequestLimits().max_request_bytes
GENERATE = "/scalellm.v1.Generation/Generate"


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    model = model_dir("smollm2-135m-instruct")
    return start_line(module_spawn, module_redis, model, executors=(FAKE,), tokenizer=("--workers", "1"))


@pytest.fixture(params=["tokenizer", "scheduler", "executor"])
def service(request: pytest.FixtureRequest, line: Line) -> ServiceProcess:
    return {"tokenizer": line.tokenizer, "scheduler": line.scheduler, "executor": line.executors[0]}[request.param]


@pytest.fixture(autouse=True)
async def neighbours_are_served(line: Line):
    yield
    async with line.channel() as channel:
        request = generation_pb2.GenerateRequest(prompt="Hi", sampling=common_pb2.SamplingParams(max_tokens=3))
        answer = await generate(channel, request, timeout=PATIENCE)
        assert answer.code is grpc.StatusCode.OK, answer.details


async def check_health(address: str, *, compression: grpc.Compression | None = None) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(address, compression=compression) as channel:
        return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).code()


async def test_metadata_that_is_no_text_is_not_logged(service: ServiceProcess) -> None:
    log = service.log.read_text()
    metadata = [("authorization", b"Bearer se\xffcret"), *[(f"x-{number}", b"\xfe\xff") for number in range(3)]]
    async with connect(service.address) as connection:
        streams = [await connection.call("/grpc.health.v1.Health/Check", b"", metadata) for _ in range(200)]
        codes = {(await connection.answer(stream)).code for stream in streams}
    assert codes == {grpc.StatusCode.OK}
    assert await check_health(service.address) is grpc.StatusCode.OK
    assert service.log.read_text() == log


async def test_compressed_messages_are_refused(service: ServiceProcess) -> None:
    log = service.log.read_text()
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert await check_health(service.address, compression=compression) is grpc.StatusCode.UNIMPLEMENTED
    assert await check_health(service.address) is grpc.StatusCode.OK
    assert service.log.read_text() == log


async def test_messages_beyond_the_limit_are_refused_unread(line: Line) -> None:
    async with line.channel() as channel:
        call = channel.unary_stream(GENERATE)(b"\0" * (MAX_REQUEST_BYTES + 1), timeout=PATIENCE)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, await call.details()
        assert f"larger than max ({MAX_REQUEST_BYTES + 1} vs. {MAX_REQUEST_BYTES})" in await call.details()
        call = channel.unary_stream(GENERATE)(b"\0" * MAX_REQUEST_BYTES, timeout=PATIENCE)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_half_a_million_empty_messages_are_forgotten(line: Line) -> None:
    """Each call's are 28 MiB of objects, which must be gone at its end."""
    num_messages = MAX_REQUEST_BYTES // 2 - 8
    message = generation_pb2.GenerateRequest(
        chat=generation_pb2.Chat(messages=[generation_pb2.ChatMessage()] * num_messages)
    ).SerializeToString()
    assert MAX_REQUEST_BYTES - 32 < len(message) <= MAX_REQUEST_BYTES
    worker = next(
        child for child in line.tokenizer.children() if "scalellm.services.tokenizer.worker" in child.cmdline()
    )

    async def call(times: int) -> int:
        async with line.channel() as channel:
            for _ in range(times):
                call = channel.unary_stream(GENERATE)(message, timeout=PATIENCE)
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert f"must hold 1 to 1024 messages, got {num_messages}" in await call.details()
        return psutil.Process(worker.pid).memory_info().rss

    before = await call(3)
    assert await call(8) - before < 100 * 2**20
