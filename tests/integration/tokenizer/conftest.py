"""A tokenizer service as an operator would start it, in front of a scripted scheduler.

The files of this folder share one service in each process of the tests, since starting one takes more time than most
of the tests. So sessions and requests have ids that no other test uses, and metrics are compared with what they were
before. A test that needs a service with other options, or harms one, starts its own. The scheduler lives in the event
loop of the session, and so do the tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import redis as redis_client
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from tokenizers import Tokenizer

from scalellm.services.tokenizer.text.loading import load_model_tokenizer
from scalellm.v1 import generation_pb2, generation_pb2_grpc, sessions_pb2_grpc, tokenizer_pb2_grpc
from scripted_scheduler import ScriptedScheduler
from service_processes import PATIENCE, RedisProcess, ServiceProcess, Spawn, eventually

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of this folder in the event loop of the session, the scheduler's."""
    for item in items:
        if FOLDER in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


class EdgeClient:
    """All public stubs on one connection of its own."""

    def __init__(self, address: str) -> None:
        # A pool of its own: another client is another connection, maybe to another worker.
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.generation: Any = generation_pb2_grpc.GenerationStub(self.channel)
        self.tokenizer: Any = tokenizer_pb2_grpc.TokenizerStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self.sessions: Any = sessions_pb2_grpc.SessionsStub(self.channel)

    async def wait_serving(self) -> None:
        """Wait until the service calls itself healthy: its link to the scheduler is up."""
        request = health_pb2.HealthCheckRequest()
        async with asyncio.timeout(PATIENCE):
            async for answer in self.health.Watch(request):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    async def generate(self, request: generation_pb2.GenerateRequest, timeout: float = PATIENCE) -> Answer:
        call = self.generation.Generate(request, timeout=timeout)
        answer = Answer([event async for event in call])
        answer.trailers = {str(key): value for key, value in await call.trailing_metadata()}
        return answer


class Answer:
    """All events of one call."""

    def __init__(self, events: list[generation_pb2.GenerateResponse]) -> None:
        self.events = events
        self.trailers: dict[str, Any] = {}
        assert events[0].HasField("started")
        assert events[-1].HasField("finished")
        self.started = events[0].started
        self.finished = events[-1].finished
        self.deltas = [event.delta for event in events if event.HasField("delta")]
        self.prompt_parts = [event.prompt_logprobs for event in events if event.HasField("prompt_logprobs")]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def logprobs(self, index: int = 0) -> list[float]:
        return [value for delta in self.deltas if delta.index == index for value in delta.logprobs.logprobs]

    def prompt_logprobs(self) -> list[float]:
        return [value for part in self.prompt_parts for value in part.logprobs.logprobs]

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.index == index for token in delta.token_ids]


def details(error: grpc.aio.AioRpcError) -> tuple[dict[str, str], float | None]:
    """The google.rpc details of an error: violations by field, and the retry delay in seconds."""
    status = rpc_status.from_call(error)
    violations: dict[str, str] = {}
    retry_after = None
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest.FromString(detail.value)
            violations |= {item.field: item.description for item in bad_request.field_violations}
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_after = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToNanoseconds() / 1e9
    return violations, retry_after


@pytest.fixture(scope="session")
def error_details() -> Callable[[grpc.aio.AioRpcError], tuple[dict[str, str], float | None]]:
    return details


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_scheduler() -> AsyncIterator[ScriptedScheduler]:
    scheduler = await ScriptedScheduler().start()
    yield scheduler
    await scheduler.stop()


@pytest.fixture(scope="session")
def service(
    shared_scheduler: ScriptedScheduler,
    session_spawn: Spawn,
    session_redis: RedisProcess,
    model_dir: Callable[[str], Path],
) -> ServiceProcess:
    return session_spawn(
        "tokenizer", "--scheduler", shared_scheduler.address, "--model", str(model_dir("smollm2-135m-instruct")),
        "--workers", "1", "--redis-url", session_redis.url, "--metrics-port", "0", "--http-metrics",
    )  # fmt: skip


@pytest.fixture(scope="session")
def connect() -> Callable[[str], EdgeClient]:
    """Make more clients; the test closes their channels."""
    return EdgeClient


@pytest.fixture(scope="session")
def tokenizer(model_dir: Callable[[str], Path]) -> Tokenizer:
    """The oracle: the library itself, on what the loader builds from the model."""
    return load_model_tokenizer(model_dir("smollm2-135m-instruct")).tokenizer


@pytest_asyncio.fixture(loop_scope="session")
async def scheduler(shared_scheduler: ScriptedScheduler) -> ScriptedScheduler:
    """Without scripts, and with nothing running of the tests before."""
    shared_scheduler.reset()
    await eventually(lambda: shared_scheduler.num_running == 0)
    return shared_scheduler


@pytest_asyncio.fixture(loop_scope="session")
async def client(service: ServiceProcess, scheduler: ScriptedScheduler) -> AsyncIterator[EdgeClient]:
    client = EdgeClient(service.address)
    await client.wait_serving()
    yield client
    await client.channel.close()


@pytest.fixture
def store(session_redis):
    client = redis_client.Redis.from_url(session_redis.url)
    yield client
    assert [key for key in client.keys("*") if client.pttl(key) < 0] == [], "keys without an end"
    client.close()


@pytest.fixture
def start(scheduler, spawn, redis, model_dir):
    """Start a service with one worker on the test's own Redis."""

    def start(*flags: str):
        return spawn(
            "tokenizer", "--scheduler", scheduler.address, "--model", str(model_dir("smollm2-135m-instruct")),
            "--workers", "1", "--redis-url", redis.url, "--metrics-port", "0", "--kept-ttl-s", "60", *flags,
        )  # fmt: skip

    return start


@pytest.fixture
def open_keys(redis):
    """Keys of the test's own Redis that have no end, which there must be none of."""
    store = redis_client.Redis.from_url(redis.url)
    yield lambda: [key for key in store.keys("*") if store.pttl(key) < 0]
    store.close()
