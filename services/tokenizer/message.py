"""One message of a conversation: as clients send it, as it is stored, and as chat templates read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scalellm.services.tokenizer.dialect import Dialect, JsonArguments, Part, PartKind
from scalellm.services.tokenizer.dialect.dialect import ToolsInPrompt
from scalellm.services.tokenizer.dialect.known import HERMES
from scalellm.v1 import generation_pb2


class FunctionCall(NamedTuple):
    """A function call of an assistant; its arguments are a JSON object as text."""

    call_id: str
    name: str
    arguments: str


class Message(NamedTuple):
    """One message.

    Attributes:
        role: The speaker.
        content: The text.
        reasoning: An assistant's earlier reasoning.
        calls: Calls of an assistant.
        call_id: Id of the call that a tool's result answers.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[FunctionCall, ...] = ()
    call_id: str = ""

    @classmethod
    def of_wire(cls, message: generation_pb2.ChatMessage) -> Message:
        """Return a client's message."""
        calls = tuple(FunctionCall(call.id, call.name, call.arguments) for call in message.tool_calls)
        return cls(message.role, message.content, message.reasoning, calls, message.tool_call_id)

    def to_wire(self) -> generation_pb2.ChatMessage:
        """Return the message as clients read it."""
        calls = [generation_pb2.ToolCall(id=call[0], name=call[1], arguments=call[2]) for call in self.calls]
        return generation_pb2.ChatMessage(
            role=self.role,
            content=self.content,
            reasoning=self.reasoning,
            tool_calls=calls,
            tool_call_id=self.call_id,
        )

    @classmethod
    def answer(cls, parts: Sequence[Part]) -> Message:
        """Return the message of an assistant's answer that has these parts."""
        texts = {kind: "".join(part.text for part in parts if part.kind is kind) for kind in PartKind}
        begun: dict[int, FunctionCall] = {}
        for part in parts:
            if part.kind is PartKind.CALL:
                before = begun.get(part.number, FunctionCall(part.call_id, part.name, ""))
                begun[part.number] = before._replace(arguments=before.arguments + part.text)
        calls = tuple(call for call in begun.values() if _is_object(call.arguments))  # one may have been cut off
        return cls("assistant", texts[PartKind.TEXT], texts[PartKind.REASONING], calls)

    def stored(self) -> list[Any]:
        """Return the message as JSON for storage: role and content, and the other fields that have a value."""
        rest: dict[str, Any] = {}
        if self.reasoning:
            rest["reasoning"] = self.reasoning
        if self.calls:
            rest["calls"] = self.calls
        if self.call_id:
            rest["call_id"] = self.call_id
        return [self.role, self.content, rest] if rest else [self.role, self.content]

    @classmethod
    def of_stored(cls, stored: Sequence[Any]) -> Message:
        """Return the message from the JSON that `stored` returned. Raises TypeError or ValueError for any
        other JSON.
        """
        role, content, *others = stored
        rest: Mapping[str, Any] = others[0] if others else {}
        calls = tuple(FunctionCall(*call) for call in rest.get("calls", ()))
        return cls(role, content, rest.get("reasoning", ""), calls, rest.get("call_id", ""))


def for_template(messages: Sequence[Message], tools: Sequence[Any], dialect: Dialect) -> list[dict[str, Any]]:
    """Return messages as the variable `messages` of a chat template.

    Args:
        messages: The conversation; arguments of calls were checked to be JSON objects.
        tools: Functions that the model may call, as the variable `tools`.
        dialect: The dialect, which defines the form in which the model gets tools.
    """
    if dialect.tools is ToolsInPrompt.WRITTEN_OUT:
        return _written_out(messages, tools)
    names: dict[str, str] = {}
    told = []
    is_one_by_one = dialect.tools is ToolsInPrompt.ONE_BY_ONE
    for message in _one_by_one(messages) if is_one_by_one else messages:
        names |= {call.call_id: call.name for call in message.calls}
        told.append(_for_template(message, names, as_sent=dialect.tools is ToolsInPrompt.AS_SENT))
        if is_one_by_one and (reasoning := told[-1].pop("reasoning_content", "")):
            told[-1]["thinking"] = reasoning
    return told


def _one_by_one(messages: Sequence[Message]) -> Iterator[Message]:
    """Divide messages so that none has several calls, or both text and reasoning beside a call. Results follow their
    calls.

    Beside a call, text and reasoning are joined, because the model wrote both before the call.
    """
    waiting: list[Message] = []
    for message in messages:
        if waiting and message.call_id:  # a result of one of these
            waiting.append(message)
            continue
        yield from _with_results(waiting)
        waiting = [message]
    yield from _with_results(waiting)


def _with_results(messages: Sequence[Message]) -> Iterator[Message]:
    """Divide a message with calls, and the results after it: yield each call as a message, followed by its results."""
    if not messages:
        return
    first, *results = messages
    if first.calls and first.reasoning and first.content:
        first = first._replace(reasoning=f"{first.reasoning}\n{first.content}", content="")
    yield first._replace(calls=first.calls[:1])
    for number, call in enumerate(first.calls):
        if number:
            yield Message(first.role, calls=(call,))
        yield from (result for result in results if result.call_id == call.call_id)
    called = {call.call_id for call in first.calls}
    yield from (result for result in results if result.call_id not in called)


def _for_template(message: Message, names: Mapping[str, str], *, as_sent: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        told["reasoning_content"] = message.reasoning
    if message.calls:
        if as_sent and not message.content:
            told["content"] = None
        told["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.arguments if as_sent else json.loads(call.arguments or "{}"),
                },
            }
            for call in message.calls
        ]
    if message.call_id:
        told["tool_call_id"] = message.call_id
        if message.call_id in names:
            told["name"] = names[message.call_id]
    return told


_TOLD = """\
You may call functions. Each of these lines describes one, its arguments by a JSON Schema:
<tools>
{tools}
</tools>

To call a function, write:
{call}"""


def _written_out(messages: Sequence[Message], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages with tools, calls and results written into their contents, for templates that support none of
    these.
    """
    told: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        role, content = message.role, message.content
        if message.calls:
            calls = HERMES.separator.join(_call(call) for call in message.calls)
            content = f"{content}\n{calls}" if content else calls
        is_result = bool(message.call_id)
        if is_result:
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if was_result:  # many templates want roles to alternate
                content = f"{told.pop()['content']}\n{content}"
        was_result = is_result
        told.append({"role": role, "content": content})
    if tools:
        schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        call = _call(FunctionCall("", "NAME", '{"ARGUMENT": VALUE}'))
        text = _TOLD.format(tools=schemas, call=call)
        if told and told[0]["role"] == "system":
            told[0]["content"] = f"{told[0]['content']}\n\n{text}" if told[0]["content"] else text
        else:
            told.insert(0, {"role": "system", "content": text})
    return told


def _call(call: FunctionCall) -> str:
    assert isinstance(HERMES.arguments, JsonArguments)
    return f"{HERMES.before}{call.name}{HERMES.between}{call.arguments or '{}'}{HERMES.after}"


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
