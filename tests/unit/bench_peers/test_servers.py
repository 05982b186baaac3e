"""The HTTP server around libraries that have none, on a fake engine in a process of its own."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import httpx2 as httpx
import pytest

from bench.load.http_server import port_of, serve_http
from bench.load.openai_target import OpenAiTarget
from bench.load.records import Ended, Request, Tokens
from bench.peers.servers.front import Front, TextFormat
from bench.peers.servers.stepping import Stepping
from fake_peer_engine import COUNT_JOBS, FAIL, FakePeerEngine
from service_processes import PATIENCE
from word_tokenizer import WORDS, write_chat, write_word_tokenizer


@pytest.fixture
async def base_url(tmp_path):
    write_word_tokenizer(tmp_path)
    write_chat(tmp_path)
    engine = Stepping(FakePeerEngine)
    await engine.ready
    server = await serve_http(Front("fake", TextFormat(tmp_path), engine))
    yield f"http://127.0.0.1:{port_of(server)}/v1"
    server.close()
    engine.close()
    await asyncio.wait_for(engine.ended, PATIENCE)


async def answer(base_url: str, request: Request) -> tuple[list[str], Ended]:
    target = OpenAiTarget(base_url)
    try:
        assert (await target.info()).model == "fake"
        events = [event async for event in target.stream(request)]
    finally:
        await target.close()
    return [event.text for event in events if isinstance(event, Tokens)], events[-1]


async def test_tokens_come_one_by_one_and_are_counted(base_url):
    asked = [Request((), f"{WORDS[0]} {WORDS[10 * number]}", 5) for number in range(1, 9)]
    for number, (texts, ended) in enumerate(await asyncio.gather(*(answer(base_url, request) for request in asked)), 1):
        assert "".join(texts).split() == WORDS[10 * number + 1 : 10 * number + 6]
        assert len(texts) == 5
        assert (ended.prompt_tokens, ended.output_tokens) == (2, 5)


async def test_whole_answers_and_chats(base_url):
    texts, ended = await answer(base_url, Request((), "aa ab", 3, stream=False))
    assert "".join(texts).split() == ["ac", "ad", "ae"]
    assert ended.output_tokens == 3
    # 1 aa 1 ab 1 ac 1
    _, ended = await answer(base_url, Request((), "ac", 1, session_id="s", history=("aa", "ab")))
    assert ended.prompt_tokens == 7


@pytest.mark.parametrize(
    ("path", "body"),
    [("completions", "{"), ("completions", "{}"), ("completions", '{"prompt": "aa", "temperature": 1}')],
)
async def test_what_it_does_not_understand_is_refused(base_url, path, body):
    async with httpx.AsyncClient(trust_env=False) as client:
        refused = await client.post(f"{base_url}/{path}", content=body)
    assert refused.status_code == 400
    assert json.loads(refused.text)["error"]["message"]


async def test_a_job_that_nobody_reads_is_dropped():
    engine = Stepping(FakePeerEngine)
    await engine.ready
    async with aclosing(engine.generate([0], 10**9, True)) as steps:
        assert list(await anext(steps)) == [1]
        assert [list(token_ids) async for token_ids in engine.generate([COUNT_JOBS], 1, True)] == [[2]]
    assert [list(token_ids) async for token_ids in engine.generate([COUNT_JOBS], 1, True)] == [[1]]
    engine.close()
    await asyncio.wait_for(engine.ended, PATIENCE)


async def test_the_end_of_the_engine_is_seen():
    engine = Stepping(FakePeerEngine)
    await engine.ready
    waiting = asyncio.ensure_future(anext(engine.generate([FAIL], 9, True)))
    await asyncio.wait_for(engine.ended, PATIENCE)
    waiting.cancel()
