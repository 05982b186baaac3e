"""litellm against a server: the address up to and with /v1 and the model. Prints what it got as JSON."""

import asyncio
import json
import sys

import litellm

base_url, model = sys.argv[1:]
ROUTE = {"model": f"openai/{model}", "api_base": base_url, "api_key": "none", "num_retries": 0}
CALL = {**ROUTE, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "seed": 7}


def streamed() -> dict:
    chunks = list(litellm.completion(**CALL, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks, messages=CALL["messages"])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text
    return {"text": text, "usage": whole.usage.completion_tokens, "reason": whole.choices[0].finish_reason}


async def side_by_side() -> list[str]:
    answers = await asyncio.gather(*(litellm.acompletion(**CALL) for _ in range(8)))
    return [answer.choices[0].message.content for answer in answers]


async def streamed_async() -> str:
    stream = await litellm.acompletion(**CALL, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def refused(**changes: object) -> list[str]:
    try:
        litellm.completion(**{**CALL, **changes})
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


answer = litellm.completion(**CALL)
text_answer = litellm.text_completion(
    **{**ROUTE, "model": f"text-completion-openai/{model}"}, prompt="Hello", max_tokens=4
)
found = {
    "whole": {
        "text": answer.choices[0].message.content,
        "usage": answer.usage.completion_tokens,
        "reason": answer.choices[0].finish_reason,
    },
    "streamed": streamed(),
    "side_by_side": asyncio.run(side_by_side()),
    "streamed_async": asyncio.run(streamed_async()),
    "completion_tokens": text_answer.usage.completion_tokens,
    "logprobs": len(litellm.completion(**CALL, logprobs=True, top_logprobs=2).choices[0].logprobs.content),
    "top_p": refused(top_p=7),
    "model": refused(model="openai/gpt-5"),
}
print(json.dumps(found))
