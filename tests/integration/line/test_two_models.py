"""Two models behind one address: each request goes to its model, and what befalls one does not touch the other."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from line import Line, generate, scrape, start_line
from scalellm.services.common.api_keys import DEFAULT_TENANT
from scalellm.services.tokenizer.aliases import Alias
from scalellm.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from service_processes import PATIENCE, RedisProcess, Spawn, eventually

# Of one tokenizer: loading another one, of a real model, takes longer than all tests. Names alone tell them apart.
ONE, TWO = "one", "two"
CHAT = "chat"


@pytest.fixture(scope="module")
def alias_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aliases") / "aliases.toml"
    replace_file(path, f"{CHAT} = {{{ONE} = 70, {TWO} = 30}}")
    return path


def replace_file(path: Path, text: str) -> None:
    """Write a file that nobody reads half written."""
    written = path.with_suffix(".new")
    written.write_text(text)
    written.replace(path)


@pytest.fixture(scope="module")
def line(module_spawn: Spawn, module_redis: RedisProcess, model_dir: Callable[[str], Path], alias_file: Path) -> Line:
    model = model_dir("smollm2-135m-instruct")
    fake = ("--engine", "fake")
    return start_line(
        module_spawn,
        module_redis,
        model,
        executors=((*fake, "--model-name", ONE), (*fake, "--model-name", TWO)),
        scheduler=("--executor-grace-s", "1"),
        tokenizer=("--workers", "1", "--model", f"{ONE}={model},{TWO}={model}", "--aliases", str(alias_file)),
        num_models=2,
    )


def request(model: str = "", max_tokens: int = 8, **fields: object) -> generation_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    if "chat" not in fields:
        fields["prompt"] = "Rivers of Europe:"
    return generation_pb2.GenerateRequest(
        model=model, sampling=sampling, output=generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS, **fields
    )


def chat(text: str) -> generation_pb2.Chat:
    return generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=text)])


async def test_each_request_goes_to_its_model(line: Line) -> None:
    async with line.channel() as channel:
        answers = {name: await generate(channel, request(name)) for name in ("", ONE, TWO)}
        tokenizer = tokenizer_pb2_grpc.TokenizerStub(channel)
        infos = {name: await tokenizer.GetInfo(tokenizer_pb2.GetInfoRequest(model=name)) for name in answers}
        encoded = {
            name: await tokenizer.Encode(tokenizer_pb2.EncodeRequest(text="Rivers", model=name)) for name in answers
        }
        unknown = await generate(channel, request("gpt-5"))
    for name, answer in answers.items():
        assert answer.started is not None, answer.details
        assert answer.started.model == infos[name].model == (name or ONE)
        assert len(answer.token_ids[0]) == 8
        assert (list(infos[name].models), list(infos[name].aliases)) == ([ONE, TWO], [CHAT])
    assert answers[""].token_ids == answers[ONE].token_ids
    assert encoded[""].token_ids == encoded[ONE].token_ids == encoded[TWO].token_ids
    assert answers[ONE].token_ids == answers[TWO].token_ids, "the fake engine says the same, whatever its name"
    assert unknown.code is grpc.StatusCode.NOT_FOUND
    assert unknown.details == f"model: 'gpt-5' is not served here, only {ONE!r} and {TWO!r} and {CHAT!r} are"
    state = await line.scheduler_state()
    assert {model.model: model.finished for model in state.models} == {ONE: 2, TWO: 1}


async def test_openai_clients_choose_by_name(line: Line) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://{line.tokenizer.http_address}/v1", api_key="none") as ai:
        assert [model.id async for model in ai.models.list()] == [ONE, TWO, CHAT]
        assert (await ai.models.retrieve(TWO)).id == TWO
        for name in (ONE, TWO):
            answer = await ai.completions.create(model=name, prompt="Rivers", max_tokens=4)
            assert (answer.model, answer.usage and answer.usage.completion_tokens) == (name, 4)
            response = await ai.responses.create(model=name, input="Rivers", max_output_tokens=4)
            assert response.model == name
        with pytest.raises(openai.NotFoundError) as unknown:
            await ai.completions.create(model="gpt-5", prompt="Rivers")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert ONE in unknown.value.message
    assert TWO in unknown.value.message


async def test_sessions_and_kept_requests_stay_with_their_model(line: Line) -> None:
    async with line.channel() as channel:
        first = await generate(channel, request(ONE, session_id="rivers", chat=chat("Name one.")))
        assert first.code is grpc.StatusCode.OK, first.details
        sessions = sessions_pb2_grpc.SessionsStub(channel)
        found = (await sessions.Get(sessions_pb2.GetSessionRequest(session_id="rivers"))).session
        listed = (await sessions.List(sessions_pb2.ListSessionsRequest())).sessions
        assert found.model == ONE
        assert {session.session_id: session.model for session in listed}["rivers"] == ONE
        other = await generate(channel, request(TWO, session_id="rivers", chat=chat("Another.")))
        assert (other.code, ONE in other.details) == (grpc.StatusCode.FAILED_PRECONDITION, True), other.details
        keep = generation_pb2.ON_DISCONNECT_KEEP
        kept = await generate(channel, request(TWO, request_id="kept", on_disconnect=keep))
        assert kept.started is not None
        assert kept.started.resumable
        stub = generation_pb2_grpc.GenerationStub(channel)
        again = [event async for event in stub.Resume(generation_pb2.ResumeRequest(request_id="kept"))]
        assert again[0].started.model == TWO
        assert "".join(event.delta.text for event in again) == kept.text
        other = await generate(channel, request(ONE, request_id="kept", on_disconnect=keep))
        assert other.code is grpc.StatusCode.ALREADY_EXISTS


async def test_models_share_the_requests_of_an_alias(line: Line, alias_file: Path) -> None:
    alias = Alias({ONE: 70, TWO: 30})
    before = models_of(line)
    async with line.channel() as channel:
        ids = [f"alias-{number}" for number in range(60)]
        answers = await asyncio.gather(*(generate(channel, request(CHAT, request_id=name)) for name in ids))
        expected = [alias.choose(DEFAULT_TENANT.name, name.encode()) for name in ids]
        assert [answer.started and answer.started.model for answer in answers] == expected
        counts = models_of(line)
        assert {name: counts[name] - before[name] for name in counts} == Counter(expected)
        # A kept request and a session that began with the one stay with it once the alias stands for the other.
        keep = {"request_id": "alias-kept-2", "on_disconnect": generation_pb2.ON_DISCONNECT_KEEP}
        began = [
            await generate(channel, request(CHAT, **keep)),
            await generate(channel, request(CHAT, session_id="alias-session", chat=chat("Name one."))),
        ]
        assert [answer.started and answer.started.model for answer in began] == [ONE, ONE], began
        replace_file(alias_file, f"{CHAT} = {{{TWO} = 1}}")
        tokenizer = tokenizer_pb2_grpc.TokenizerStub(channel)
        async with asyncio.timeout(PATIENCE):
            while (await tokenizer.GetInfo(tokenizer_pb2.GetInfoRequest(model=CHAT))).model != TWO:
                await asyncio.sleep(0.05)
        again = [
            await generate(channel, request(CHAT, **keep)),
            await generate(channel, request(CHAT, session_id="alias-session", chat=chat("Another."))),
        ]
        assert [answer.started and answer.started.model for answer in again] == [ONE, ONE], again
        assert again[0].token_ids == began[0].token_ids
    async with openai.AsyncOpenAI(base_url=f"http://{line.tokenizer.http_address}/v1", api_key="none") as ai:
        first = await ai.responses.create(model=ONE, input="Rivers", max_output_tokens=4)
        behind = await ai.responses.create(model=CHAT, input="More", max_output_tokens=4, previous_response_id=first.id)
        assert behind.model == ONE, "a conversation stays with its model"
        fresh = await ai.completions.create(model=CHAT, prompt="Rivers", max_tokens=4)
        assert fresh.model == TWO
    replace_file(alias_file, f"{CHAT} = {{three = 1}}")
    unread = "scalellm_tokenizer_aliases_unread"
    await eventually(lambda: scrape(line.tokenizer)[unread] == 1)
    replace_file(alias_file, f"{CHAT} = {{{ONE} = 70, {TWO} = 30}}")
    await eventually(lambda: scrape(line.tokenizer)[unread] == 0)


def models_of(line: Line) -> dict[str, float]:
    """Return the requests that ended well, by model."""
    found = scrape(line.tokenizer)
    name = 'scalellm_request_success_total{{finished_reason="length",model_name="{}"}}'
    return {model: found[name.format(model)] for model in (ONE, TWO)}


async def test_the_loss_of_a_models_executors_leaves_the_other_alone(line: Line) -> None:
    async with line.channel() as channel:
        undisturbed = await generate(channel, request(ONE, max_tokens=600))
        for executor in line.executors:
            executor.suspend()  # else a request may have ended before the executor is killed
        running = asyncio.create_task(generate(channel, request(ONE, max_tokens=600)))
        lost = asyncio.create_task(generate(channel, request(TWO, max_tokens=600)))
        async with asyncio.timeout(PATIENCE):
            while sum(model.running for model in (await line.scheduler_state()).models) < 2:
                assert not running.done()
                assert not lost.done()
                await asyncio.sleep(0.01)
        line.executors[1].kill_tree()
        line.executors[0].resume()
        assert (await running).token_ids == undisturbed.token_ids
        ended = await lost
        assert (ended.code, TWO in ended.details) == (grpc.StatusCode.UNAVAILABLE, True), ended.details
        refused = await generate(channel, request(TWO))
        assert (refused.code, TWO in refused.details) == (grpc.StatusCode.UNAVAILABLE, True), refused.details
        served = await generate(channel, request(ONE))
        assert served.code is grpc.StatusCode.OK
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    state = await line.scheduler_state()
    assert {model.model: model.ready_executors for model in state.models} == {ONE: 1, TWO: 0}
