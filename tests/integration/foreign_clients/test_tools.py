"""Functions called by way of OpenAI's client and LangChain: valid by construction, whatever draws the tokens."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from pydantic import BaseModel, Field

from foreign_clients import LANGCHAIN, environment, found_by
from line import Line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODEL = "smollm2-135m-instruct"


class Weather(BaseModel):
    """The weather of a town."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=7)


class Now(BaseModel):
    """The time."""

    zone: str = Field(pattern="[A-Z]{3}")


TOOLS = {"Weather": Weather, "Now": Now}


def base_url(line: Line) -> str:
    return f"http://{line.tokenizer.http_address}/v1"


def test_langchain(fake_line, programs) -> None:
    program = str(programs / "langchain_tools.py")
    found = found_by([environment(LANGCHAIN).program("python"), program, base_url(fake_line), MODEL])
    assert found == {
        "call": True,
        "same": True,
        "reason": "tool_calls",
        "behind": 8,
        "named": ["Weather"],
        "responses": "Weather",
        "structured": ["Weather", "Weather"],
    }


async def test_a_real_model_that_has_gone_wild_calls_what_it_may(real_line) -> None:
    schemas = [openai.pydantic_function_tool(tool) for tool in TOOLS.values()]
    async with openai.AsyncOpenAI(base_url=base_url(real_line), api_key="none", timeout=900.0) as ai:

        async def call(seed: int, choice: object, n: int) -> int:
            answer = await ai.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "How is the weather in Rome?"}],
                tools=schemas,
                tool_choice=choice,
                parallel_tool_calls=False,
                temperature=2,
                seed=seed,
                n=n,
                max_tokens=200,
            )
            for sample in answer.choices:
                if sample.finish_reason == "length":
                    continue
                assert sample.finish_reason == "tool_calls"
                assert sample.message.content is None
                (made,) = sample.message.tool_calls
                assert choice == "required" or made.function.name == "Now"
                TOOLS[made.function.name](**json.loads(made.function.arguments))
            return sum(sample.finish_reason == "tool_calls" for sample in answer.choices)

        named = {"type": "function", "function": {"name": "Now"}}
        calls = [call(seed, "required" if seed % 2 else named, 2) for seed in range(6)]
        assert sum(await asyncio.gather(*calls)) >= 6, "of 12 samples"
