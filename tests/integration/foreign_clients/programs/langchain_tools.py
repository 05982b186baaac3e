"""langchain-openai calls functions of a server: the address up to and with /v1 and the model. Prints JSON."""

import json
import sys
from enum import Enum

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

base_url, model = sys.argv[1:]
ROUTE = {"base_url": base_url, "api_key": "none", "model": model, "max_retries": 0}


class Sky(Enum):
    CLEAR = "clear"
    GREY = "grey"


class Weather(BaseModel):
    """The weather of a town."""

    city: str = Field(max_length=12)
    sky: Sky
    days: int = Field(ge=1, le=7)


question = HumanMessage("How is the weather?")
chat = ChatOpenAI(**ROUTE, max_tokens=1000, temperature=2, seed=7)
bound = chat.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
answer = bound.invoke([question])
whole = None
for chunk in bound.stream([question]):
    whole = chunk if whole is None else whole + chunk
(call,) = answer.tool_calls
behind = chat.bind(max_tokens=8).invoke([question, answer, ToolMessage("Grey.", tool_call_id=call["id"])])
named = chat.bind_tools([Weather], tool_choice="Weather").invoke([question])
responses = ChatOpenAI(**ROUTE, max_tokens=1000, use_responses_api=True).bind_tools([Weather], tool_choice="Weather")
found = {
    "call": Weather(**call["args"]).model_dump(mode="json") == call["args"],
    "same": [one["args"] for one in whole.tool_calls] == [call["args"]],
    "reason": answer.response_metadata["finish_reason"],
    "behind": behind.usage_metadata["output_tokens"],
    "named": [one["name"] for one in named.tool_calls],
    "responses": responses.invoke([question]).tool_calls[0]["name"],
    "structured": [
        type(chat.with_structured_output(Weather, method=method).invoke([question])).__name__
        for method in ("function_calling", "json_schema")
    ],
}
print(json.dumps(found))
