"""Bytes that are no requests, at every door: each is answered or refused, and everything works afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from line import Line, generate, start_line
from mutated_messages import FRAMES, SAMPLING, mutations
from scalellm.services.common.access import METHODS
from scalellm.v1 import common_pb2, generation_pb2, sessions_pb2, tokenizer_pb2
from service_processes import PATIENCE, Spawn

FAKE = ("--engine", "fake", "--max-model-len", "2048", "--num-blocks", "512")
EXAMPLES = 120
CRASHES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}

CHAT = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content="Hi")])
SEEDS = (
    generation_pb2.GenerateRequest(prompt="Hi", sampling=SAMPLING, stop=["x"], priority=3),
    generation_pb2.GenerateRequest(chat=CHAT, sampling=common_pb2.SamplingParams(max_tokens=2), session_id="s"),
    tokenizer_pb2.EncodeRequest(text="Hello"),
    tokenizer_pb2.DecodeRequest(token_ids=[1, 2, 3]),
    sessions_pb2.ListSessionsRequest(page_size=3, page_token="WzAsICJhIl0="),
    sessions_pb2.ForkSessionRequest(session_id="s", new_session_id="t", num_turns=1),
)


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis, model_dir) -> Line:
    model = model_dir("smollm2-135m-instruct")
    return start_line(module_spawn, module_redis, model, executors=(FAKE,), tokenizer=("--workers", "1"))


@pytest.fixture(autouse=True)
async def everything_works_afterwards(line) -> Iterator[None]:
    children = [child.pid for service in (line.tokenizer, *line.executors) for child in service.children()]
    yield
    async with line.channel() as channel:
        request = generation_pb2.GenerateRequest(prompt="Hi", sampling=common_pb2.SamplingParams(max_tokens=3))
        answer = await generate(channel, request, timeout=PATIENCE)
        assert answer.code is grpc.StatusCode.OK, answer.details
    assert [child.pid for service in (line.tokenizer, *line.executors) for child in service.children()] == children
    for service in (line.tokenizer, line.scheduler, *line.executors):
        assert "Traceback" not in service.log.read_text(), service.log.read_text()[-4000:]


def run_examples(strategy: st.SearchStrategy, call) -> Counter:
    """Call with each example, and count the codes."""
    counts: Counter[str] = Counter()

    @seed(5)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def examples(data) -> None:
        code = call(data)
        counts[code.name] += 1
        assert code not in CRASHES, (code, data)

    examples()
    return counts


def public_methods() -> list[str]:
    services = ("Generation", "Tokenizer", "Sessions")
    return [method for method in METHODS if method.split("/")[1].removeprefix("scalellm.v1.") in services]


@pytest.mark.slow
@pytest.mark.parametrize("method", public_methods())
def test_public_methods(line, method) -> None:
    with grpc.insecure_channel(line.address) as channel:
        invoke = channel.unary_stream(method)

        def call(data: bytes) -> grpc.StatusCode:
            answers = invoke(data, timeout=5)
            try:
                for _ in answers:
                    pass
            except grpc.RpcError:
                pass
            return answers.code()

        print(method, dict(run_examples(mutations(SEEDS), call)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["/scalellm.v1.Scheduler/Connect", "/scalellm.v1.Executor/Execute"])
def test_links(line, method) -> None:
    address = line.scheduler.address if "Scheduler" in method else line.executors[0].address
    hello = FRAMES[0].SerializeToString()
    with grpc.insecure_channel(address) as channel:
        invoke = channel.stream_stream(method)

        def call(frames: tuple[bool, list[bytes]]) -> grpc.StatusCode:
            is_opened, rest = frames
            answers = invoke(iter([hello] * is_opened + rest), timeout=5)
            try:
                for _ in answers:
                    pass
            except grpc.RpcError:
                pass
            return answers.code()

        strategy = st.tuples(st.booleans(), st.lists(mutations(FRAMES), max_size=4))
        print(method, dict(run_examples(strategy, call)))
