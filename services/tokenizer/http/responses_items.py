"""Items of the Responses API, of which inputs and responses consist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from scalellm.services.common.errors import StatusError
from scalellm.services.common.sent_text import as_text, json_text
from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.http.messages import add_messages, text_of
from scalellm.services.tokenizer.http.wire import quote
from scalellm.services.tokenizer.message import Message
from scalellm.v1 import generation_pb2

_PREFIXES = {PartKind.TEXT: "msg", PartKind.REASONING: "rs", PartKind.CALL: "fc"}


@dataclass(slots=True)
class OutputItem:
    """An item of a response while it grows.

    Attributes:
        kind: A message, reasoning or a call.
        item_id: Its id.
        call_id: Id of a call.
        name: Name of the function that is called.
        texts: Text, reasoning or arguments so far.
        logprobs: Log-probabilities of a message, so far.
    """

    kind: PartKind
    item_id: str
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, part: Part, number: int, response_id: str) -> OutputItem:
        """Make the empty item that a part begins."""
        end = response_id.removeprefix("resp_")
        item_id = f"{_PREFIXES[part.kind]}_{end}" + (f"_{number}" if number else "")
        return cls(part.kind, item_id, part.call_id, part.name)

    def has_more(self, part: Part) -> bool:
        """True if a part continues this item."""
        return part.kind is self.kind and not part.call_id

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    def json(self, status: str, *, is_empty: bool = False) -> str:
        """Return the item as JSON; is_empty: True for its form at the beginning."""
        head = f'{{"id":"{self.item_id}","status":"{status}"'
        part = "" if is_empty else self.part()
        match self.kind:
            case PartKind.TEXT:
                return f'{head},"type":"message","role":"assistant","content":[{part}]}}'
            case PartKind.REASONING:
                return f'{head},"type":"reasoning","summary":[],"content":[{part}]}}'
        arguments = '""' if is_empty else quote(self.text)
        names = f'"call_id":{quote(self.call_id)},"name":{quote(self.name)}'
        return f'{head},"type":"function_call",{names},"arguments":{arguments}}}'

    def part(self, *, is_empty: bool = False) -> str:
        """Return the one part of the content of a message or of reasoning."""
        text = '""' if is_empty else quote(self.text)
        if self.kind is PartKind.REASONING:
            return f'{{"type":"reasoning_text","text":{text}}}'
        logprobs = "" if is_empty else ",".join(self.logprobs)
        return f'{{"type":"output_text","text":{text},"annotations":[],"logprobs":[{logprobs}]}}'


def messages_of(items: object) -> tuple[list[Message], list[int]]:
    """Return the messages of an input, and the index of the item with which each begins. Raises StatusError.

    Calls are added to the assistant's message before them, and reasoning to the message after it.
    """
    if not isinstance(items, list):
        raise StatusError.invalid("input", "must be a string or a list of items")
    chat, begins = generation_pb2.Chat(), []
    reasoning = ""
    for index, item in enumerate(items):
        where = f"input[{index}]"
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        count = len(chat.messages)
        if kind == "message":
            _add_message(chat, item, where)
        elif kind == "function_call":
            if not chat.messages or chat.messages[-1].role != "assistant":
                chat.messages.add(role="assistant")
            chat.messages[-1].tool_calls.add(
                id=as_text(item.get("call_id"), f"{where}.call_id"),
                name=as_text(item.get("name"), f"{where}.name"),
                arguments=json_text(item.get("arguments", ""), f"{where}.arguments"),
            )
        elif kind == "function_call_output":
            call_id = as_text(item.get("call_id"), f"{where}.call_id")
            if not call_id:
                raise StatusError.invalid(f"{where}.call_id", "must not be empty")
            output = text_of(item.get("output"), f"{where}.output")
            chat.messages.add(role="tool", content=output, tool_call_id=call_id)
        elif kind == "reasoning":
            reasoning += _reasoning(item, where)
        else:
            shown = repr(kind[:64]) if isinstance(kind, str) else "something else"
            raise StatusError.invalid(
                f"{where}.type",
                f"must be message, function_call, function_call_output or reasoning, got {shown}",
            )
        if len(chat.messages) > count:
            begins.append(index)
            if chat.messages[-1].role == "assistant":
                chat.messages[-1].reasoning = reasoning
            reasoning = ""
    return list(map(Message.of_wire, chat.messages)), begins


def _add_message(chat: generation_pb2.Chat, item: object, where: str) -> None:
    one = generation_pb2.Chat()
    try:
        add_messages(one, [item], "")
    except StatusError as error:
        field = where + error.field.removeprefix("[0]")
        raise StatusError.invalid(field, error.message.partition(": ")[2]) from None
    chat.messages.extend(one.messages)


def _reasoning(item: dict[str, Any], where: str) -> str:
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise StatusError.invalid(f"{where}.content", "must be a list of parts")
    return "".join(as_text(part.get("text", ""), f"{where}.content[{at}].text") for at, part in enumerate(parts))


def input_items(message: Message, item_id: str) -> list[dict[str, Any]]:
    """Return a message of a conversation as items.

    Args:
        message: The message.
        item_id: Id of the first item; those that follow have a number behind it.
    """
    head = {"id": item_id, "status": "completed"}
    if message.call_id:
        return [{**head, "type": "function_call_output", "call_id": message.call_id, "output": message.content}]
    items: list[dict[str, Any]] = []
    if message.content or not message.calls:
        part: dict[str, Any] = {"type": "input_text", "text": message.content}
        if message.role == "assistant":
            part = {"type": "output_text", "text": message.content, "annotations": [], "logprobs": []}
        items.append({**head, "type": "message", "role": message.role, "content": [part]})
    for number, call in enumerate(message.calls):
        names = {"call_id": call.call_id, "name": call.name, "arguments": call.arguments}
        items.append({**head, "id": f"{item_id}_{number}", "type": "function_call", **names})
    return items
