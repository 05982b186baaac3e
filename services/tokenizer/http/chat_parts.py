"""Reasoning and calls in the answers of /v1/chat/completions."""

from __future__ import annotations

from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.http.wire import quote
from scalellm.services.tokenizer.message import Message


def part_json(part: Part) -> str:
    """Return a part as the one field of a chunk's delta."""
    if part.kind is PartKind.TEXT:
        return f'"content":{quote(part.text)}'
    if part.kind is PartKind.REASONING:
        return f'"reasoning_content":{quote(part.text)}'
    if not part.call_id:
        return f'"tool_calls":[{{"index":{part.number},"function":{{"arguments":{quote(part.text)}}}}}]'
    return f'"tool_calls":[{{"index":{part.number},{_call(part.call_id, part.name, part.text)}}}]'


def message_json(message: Message) -> str:
    """Return the fields of a message beside its text, with a comma before each; empty: there are none."""
    shown = f',"reasoning_content":{quote(message.reasoning)}' if message.reasoning else ""
    if message.calls:
        shown += f',"tool_calls":[{",".join(f"{{{_call(*call)}}}" for call in message.calls)}]'
    return shown


def _call(call_id: str, name: str, arguments: str) -> str:
    function = f'{{"name":{quote(name)},"arguments":{quote(arguments)}}}'
    return f'"id":{quote(call_id)},"type":"function","function":{function}'
