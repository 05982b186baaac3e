"""litellm, LangChain and Vercel's AI SDK chat with a line: whole, streamed, side by side, refused, aborted."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.request import Request, urlopen

import pytest

from foreign_clients import LANGCHAIN, LITELLM, VERCEL, environment, found_by, node_program
from line import scrape
from service_processes import PATIENCE, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def base_url(fake_line) -> str:
    return f"http://{fake_line.tokenizer.http_address}/v1"


@pytest.fixture(scope="module")
def answer(base_url: str) -> dict[str, Any]:
    """Return the answer that every client has to receive: its text, number of tokens and finish reason."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": NUM_TOKENS, "seed": 7}
    request = Request(
        f"{base_url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
    )
    with urlopen(request, timeout=PATIENCE) as response:
        text = json.load(response)["choices"][0]["message"]["content"]
    return {"text": text, "usage": NUM_TOKENS, "reason": "length"}


def test_litellm(base_url: str, answer: dict[str, Any], programs) -> None:
    command = [environment(LITELLM).program("python"), str(programs / "litellm_client.py"), base_url, MODEL]
    found = found_by(command, LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert found["whole"] == found["streamed"] == answer
    assert found["side_by_side"] == [answer["text"]] * 8
    assert found["streamed_async"] == answer["text"]
    assert (found["completion_tokens"], found["logprobs"]) == (4, NUM_TOKENS)
    kind, message = found["top_p"]
    assert kind == "BadRequestError"
    assert "top_p: must be in (0, 1], got 7" in message
    kind, message = found["model"]
    assert kind == "NotFoundError"
    assert "gpt-5" in message


def test_langchain(base_url: str, answer: dict[str, Any], programs) -> None:
    command = [environment(LANGCHAIN).program("python"), str(programs / "langchain_client.py"), base_url, MODEL]
    found = found_by(command)
    texts = {found["whole"], found["streamed"], found["streamed_async"], *found["batch"]}
    assert texts == {answer["text"]}
    assert (found["usage"], found["streamed_usage"], found["logprobs"]) == (NUM_TOKENS,) * 3
    assert found["reason"] == "length"
    assert found["responses"] == [NUM_TOKENS, True]
    assert found["responses_streamed"]
    assert found["responses_follow"]
    assert found["completions"]
    assert "top_p: must be in (0, 1], got 7" in found["top_p"][1]
    # There are none; its client is told so, and what there is.
    kind, message = found["embeddings"]
    assert kind == "NotFoundError"
    assert "POST /v1/embeddings: not found; served are" in message


async def test_vercel(fake_line, base_url: str, answer: dict[str, Any], programs) -> None:
    cancelled = 'scalellm_tokenizer_requests_ended_total{code="CANCELLED",outcome="cancelled",transport="http"}'
    before = scrape(fake_line.tokenizer).get(cancelled, 0)
    command, folder = await asyncio.to_thread(node_program, programs / "vercel_client.mjs", VERCEL)
    found = await asyncio.to_thread(found_by, [*command, base_url, MODEL], folder)
    assert found["whole"] == found["streamed"] == found["chat"] == answer
    assert (found["completions"], found["responses"], found["responsesStreamed"]) == (4, NUM_TOKENS, NUM_TOKENS)
    assert found["topP"] == [400, "top_p: must be in (0, 1], got 7"]
    assert found["aborted"] == "abort"
    keys = ["city", "days"]
    assert (
        found["shaped"]
        == [{"called": ["tool-calls", "weather", keys], "streamed": ["weather", keys], "object": keys}] * 3
    )
    await eventually(lambda: scrape(fake_line.tokenizer).get(cancelled, 0) == before + 1)
