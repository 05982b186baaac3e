"""langchain-openai against a server: the address up to and with /v1 and the model. Prints what it got as JSON."""

import asyncio
import json
import sys

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

base_url, model = sys.argv[1:]
ROUTE = {"base_url": base_url, "api_key": "none", "model": model, "max_retries": 0}
QUESTION = "Hello"

chat = ChatOpenAI(**ROUTE, max_tokens=24, seed=7)
responses = ChatOpenAI(**ROUTE, max_tokens=24, use_responses_api=True)


def refused(call) -> list[str]:
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


async def streamed_async() -> str:
    return "".join([chunk.text async for chunk in chat.astream(QUESTION)])


answer = chat.invoke(QUESTION)
chunks = list(chat.stream(QUESTION, stream_usage=True))
whole = chunks[0]
for chunk in chunks[1:]:
    whole += chunk
first = responses.invoke(QUESTION)
found = {
    "whole": answer.text,
    "usage": answer.usage_metadata["output_tokens"],
    "reason": answer.response_metadata["finish_reason"],
    "streamed": whole.text,
    "streamed_usage": whole.usage_metadata["output_tokens"],
    "streamed_async": asyncio.run(streamed_async()),
    "batch": [message.text for message in chat.batch([QUESTION] * 8)],
    "logprobs": len(chat.bind(logprobs=True).invoke(QUESTION).response_metadata["logprobs"]["content"]),
    "responses": [first.usage_metadata["output_tokens"], bool(first.text)],
    "responses_streamed": bool("".join(chunk.text for chunk in responses.stream(QUESTION))),
    "responses_follow": bool(responses.invoke("And then?", previous_response_id=first.response_metadata["id"]).text),
    "completions": bool(OpenAI(**ROUTE, max_tokens=4).invoke(QUESTION)),
    "top_p": refused(lambda: ChatOpenAI(**ROUTE, top_p=7).invoke(QUESTION)),
    "embeddings": refused(
        lambda: OpenAIEmbeddings(**ROUTE, check_embedding_ctx_length=False).embed_query(QUESTION),
    ),
}
print(json.dumps(found))
