"""Both targets against scripted servers: what is sent, what is kept of it, and that nothing is lost on the way."""

import asyncio
from collections import Counter

import grpc
import pytest

from bench.load.driver import Driver
from bench.load.grpc_target import GrpcTarget
from bench.load.openai_target import OpenAiTarget
from bench.load.records import RequestError
from bench.load.run import run_step
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Load, Shape, arrival_times
from scalellm.v1 import generation_pb2
from scripted_generation import BREAKDOWN, Play
from scripted_openai import HttpPlay
from service_processes import PATIENCE

SHAPE = Shape(input_len=6, output_len=5)


@pytest.fixture
async def grpc_target(grpc_server):
    target = GrpcTarget(grpc_server.address)
    yield target
    await target.close()


@pytest.fixture
async def openai_target(openai_server):
    target = OpenAiTarget(openai_server.base_url)
    await target.info()
    yield target
    await target.close()


@pytest.fixture(params=["grpc", "openai"])
def target(request):
    return request.getfixturevalue(f"{request.param}_target")


async def drive(target, tokenizer_file, shape=SHAPE, load="3", count=12, **options):
    vocabulary = Vocabulary.of_words(tokenizer_file)
    driver = Driver(target, vocabulary, **options)
    step = await run_step(driver, shape, Load.parse(load), alphabet=vocabulary.alphabet, num_requests=count, seed="0")
    figures = step.figures
    assert figures["sent"] == len(step.records)
    assert figures["sent"] == figures["ok"] + figures["failed"] + figures["cancelled"]
    assert figures["failed"] == sum(figures["failures"].values())
    for record in step.records:
        times = [record.sent, *record.arrivals, record.ended]
        assert times == sorted(times)
    return step


async def test_all_requests_are_answered(target, tokenizer_file):
    step = await drive(target, tokenizer_file)
    assert step.figures["ok"] == 12
    assert step.figures["input_tokens"] == step.figures["planned_input_tokens"] == 12 * 6
    assert step.figures["output_tokens"] == step.figures["messages"] == 12 * 5
    assert step.figures["peak_in_flight"] == 3
    assert {len(record.arrivals) for record in step.records} == {5}


async def test_both_targets_are_sent_the_same(grpc_target, openai_target, grpc_server, openai_server, tokenizer_file):
    steps = [await drive(target, tokenizer_file, load="1") for target in (grpc_target, openai_target)]
    assert steps[0].prompts == steps[1].prompts
    text = Vocabulary.of_words(tokenizer_file).text
    ours = [text(request.tokens.ids) for request in grpc_server.requests]
    assert ours == [body["prompt"] for _, body in openai_server.requests]
    assert {request.sampling.ignore_eos for request in grpc_server.requests} == {True}
    assert {body["ignore_eos"] for _, body in openai_server.requests} == {True}


async def test_the_closed_loop_keeps_its_number_in_flight(grpc_target, grpc_server, tokenizer_file):
    barrier = asyncio.Barrier(4)
    grpc_server.play = lambda request: Play(barrier=barrier)
    step = await drive(grpc_target, tokenizer_file, load="4", count=20, deadline_s=PATIENCE)
    assert (step.figures["ok"], grpc_server.most_running) == (20, 4)


async def test_the_open_loop_sends_at_the_seeds_times(target, tokenizer_file):
    step = await drive(target, tokenizer_file, load="200/s", count=40)
    assert [record.due for record in step.records] == arrival_times(200.0, 40, "0")
    assert all(record.sent >= record.due for record in step.records)
    assert step.figures["ok"] == 40


async def test_the_open_loop_does_not_wait_for_answers(grpc_target, grpc_server, tokenizer_file):
    barrier = asyncio.Barrier(20)
    grpc_server.play = lambda request: Play(barrier=barrier)
    step = await drive(grpc_target, tokenizer_file, load="500/s", count=20, deadline_s=PATIENCE)
    assert (step.figures["ok"], grpc_server.most_running) == (20, 20)


async def test_cancelled_requests_end_at_their_token_and_at_the_server(grpc_target, grpc_server, tokenizer_file):
    grpc_server.play = lambda request: Play(hold_after=49)
    step = await drive(grpc_target, tokenizer_file, Shape(input_len=6, output_len=50, cancel_share=1.0), count=6)
    assert step.figures["cancelled"] == 6
    assert step.figures["tokens_lost"] == sum(len(record.arrivals) for record in step.records)
    async with asyncio.timeout(PATIENCE):
        while grpc_server.running:
            await asyncio.sleep(0.01)
    assert grpc_server.num_cut_short == 6


async def test_cancelled_http_requests_do_not_spoil_connections(openai_target, tokenizer_file):
    step = await drive(openai_target, tokenizer_file, Shape(input_len=6, output_len=9, cancel_share=0.5), count=40)
    assert step.figures["failed"] == 0
    assert 0 < step.figures["cancelled"] < 40


async def test_deadlines_are_kept_and_sent_along(target, grpc_server, openai_server, tokenizer_file):
    grpc_server.play = lambda request: Play(delay=10)
    openai_server.play = lambda body: HttpPlay(delay=10)
    step = await drive(target, tokenizer_file, count=3, deadline_s=0.1)
    assert step.figures["failures"] == {"deadline": 3}
    assert all(deadline is not None and deadline <= 1 for deadline in grpc_server.deadlines)


async def test_grpc_failures_are_counted_by_name(grpc_target, grpc_server, tokenizer_file):
    plays = iter(
        [
            Play(abort_after=0, code=grpc.StatusCode.RESOURCE_EXHAUSTED),
            Play(abort_after=2, code=grpc.StatusCode.UNAVAILABLE),
            Play(abort_after=2, code=grpc.StatusCode.OK),
            Play(),
        ]
    )
    grpc_server.play = lambda request: next(plays)
    step = await drive(grpc_target, tokenizer_file, load="1", count=4)
    assert step.figures["failures"] == {"RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1, "dropped": 1}
    assert step.figures["tokens_lost"] == 4
    assert "3 requests failed, the first with RESOURCE_EXHAUSTED: scripted" in step.warnings()


async def test_http_failures_are_counted_by_name(openai_target, openai_server, tokenizer_file):
    plays = iter(
        [HttpPlay(status=503), HttpPlay(drop_after=2), HttpPlay(end_after=2), HttpPlay(error_after=1), HttpPlay()]
    )
    openai_server.play = lambda body: next(plays)
    step = await drive(openai_target, tokenizer_file, load="1", count=5)
    assert step.figures["failures"] == {"http_503": 1, "dropped": 2, "server_error": 1}
    assert step.figures["ok"] == 1


async def test_a_server_in_a_hurry_loses_no_token(target, grpc_server, openai_server, tokenizer_file):
    grpc_server.play = lambda request: Play(chunk=3)
    openai_server.play = lambda body: HttpPlay(glued=True)
    step = await drive(target, tokenizer_file)
    assert step.figures["output_tokens"] == 12 * 5
    assert {sum(record.counts) for record in step.records} == {5}


async def test_whole_answers_have_no_times_of_tokens(target, grpc_server, tokenizer_file):
    step = await drive(target, tokenizer_file, stream=False)
    assert (step.figures["ok"], step.figures["output_tokens"]) == (12, 60)
    assert step.figures["ttft_ms"] is step.figures["itl_ms"] is None
    assert step.figures["e2e_ms"]["p50"] > 0
    assert {request.stream_interval for request in grpc_server.requests} <= {1024}


SESSIONS = Shape("sessions", input_len=4, output_len=3, turns=3)


async def test_sessions_are_kept_by_our_server(grpc_target, grpc_server, tokenizer_file):
    step = await drive(grpc_target, tokenizer_file, SESSIONS)
    assert step.figures["ok"] == 12
    assert sorted(grpc_server.sessions.values()) == [3, 3, 3, 3]
    assert all(len(request.chat.messages) == 1 for request in grpc_server.requests)


async def test_sessions_are_sent_whole_to_others(openai_target, openai_server, tokenizer_file):
    step = await drive(openai_target, tokenizer_file, SESSIONS, load="1")
    assert step.figures["ok"] == 12
    assert {path for path, _ in openai_server.requests} == {"/v1/chat/completions"}
    first, second, third = (body["messages"] for _, body in openai_server.requests[:3])
    assert [message["role"] for message in third] == ["user", "assistant", "user", "assistant", "user"]
    assert third[:3] == second
    assert second[:1] == first
    assert second[1]["content"] == " word" * 3
    assert Counter(record.input_tokens for record in step.records) == {4: 4, 11: 4, 18: 4}


@pytest.mark.parametrize(
    ("play", "kind", "num_sent"),
    [
        (Play(session=generation_pb2.SESSION_OUTCOME_UNAVAILABLE), "session_not_saved", 4),
        (Play(forget=True), "session_lost", 8),
    ],
)
async def test_a_session_that_breaks_ends(grpc_target, grpc_server, tokenizer_file, play, kind, num_sent):
    grpc_server.play = lambda request: play
    step = await drive(grpc_target, tokenizer_file, SESSIONS)
    assert step.figures["failures"] == {kind: 4}
    assert (step.figures["sent"], step.not_sent) == (num_sent, 12 - num_sent)
    assert any("not sent" in warning for warning in step.warnings())


async def test_the_servers_breakdown_is_kept(grpc_target, tokenizer_file):
    step = await drive(grpc_target, tokenizer_file, count=2)
    assert step.records[0].server.breakdown["prefill"] == BREAKDOWN.prefill_ns
    assert step.figures["breakdown_ms"]["total"] == pytest.approx(1.0)


@pytest.mark.parametrize("make", [lambda: GrpcTarget("127.0.0.1:1"), lambda: OpenAiTarget("http://127.0.0.1:1/v1")])
async def test_nobody_at_the_address(make):
    target = make()
    with pytest.raises(RequestError) as caught:
        await target.info()
    assert caught.value.kind in ("UNAVAILABLE", "unreachable")
    await target.close()
