"""Answers of Anthropic's /v1/messages."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.http.answer_format import Format
from scalellm.services.tokenizer.http.anthropic_content import input_of
from scalellm.services.tokenizer.http.wire import dump, latency_json, quote
from scalellm.services.tokenizer.sample_stream import Delta, parts_of
from scalellm.v1 import common_pb2, generation_pb2


def _event(name: str, rest: str) -> str:
    return f'event: {name}\ndata: {{"type":"{name}"{rest}}}\n\n'


def _usage(usage: common_pb2.Usage) -> str:
    # Tokens read from the cache are counted apart.
    fresh = usage.prompt_tokens - usage.cached_tokens
    return (
        f'{{"input_tokens":{fresh},"cache_creation_input_tokens":0,"cache_read_input_tokens":{usage.cached_tokens},'
        f'"output_tokens":{usage.completion_tokens}}}'
    )


def _end(sample: generation_pb2.SampleFinished) -> str:
    if sample.reason == common_pb2.FINISH_REASON_LENGTH:
        return '"stop_reason":"max_tokens","stop_sequence":null'
    if sample.num_tool_calls:
        return '"stop_reason":"tool_use","stop_sequence":null'
    if sample.WhichOneof("matched") == "stop":
        return f'"stop_reason":"stop_sequence","stop_sequence":{dump(sample.stop)}'
    return '"stop_reason":"end_turn","stop_sequence":null'


class MessageStream(Format):
    """The answer as events.

    Args:
        answer_id: Its id.
        model: Name of the model.
    """

    def __init__(self, answer_id: str, model: str) -> None:
        self._head = f'"id":{quote(answer_id)},"type":"message","role":"assistant","model":{quote(model)}'
        self._index = -1
        self._kind: PartKind | None = None
        """Kind of the open block; None: none is open."""

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Return the event for the beginning of the message."""
        usage = _usage(common_pb2.Usage(prompt_tokens=started.prompt_tokens))
        message = f'{{{self._head},"content":[],"stop_reason":null,"stop_sequence":null,"usage":{usage}}}'
        return _event("message_start", f',"message":{message}')

    def delta(self, prompt: int, delta: Delta) -> str:
        """Return the events for more text of a block, or for new blocks."""
        return "".join(map(self._part, parts_of(delta)))

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the events for the end of the last block and of the message."""
        (last,) = finished
        rest = f',"delta":{{{_end(last.samples[0])}}},"usage":{_usage(last.usage)},"latency":{latency_json(finished)}'
        none = self._open(Part(PartKind.TEXT, "")) if self._index < 0 else ""
        return none + self._close() + _event("message_delta", rest) + _event("message_stop", "")

    def _part(self, part: Part) -> str:
        begun = ""
        if part.kind is not self._kind or part.call_id:
            begun = self._close() + self._open(part)
        match part.kind:
            case PartKind.TEXT:
                more = f'"type":"text_delta","text":{quote(part.text)}'
            case PartKind.REASONING:
                more = f'"type":"thinking_delta","thinking":{quote(part.text)}'
            case PartKind.CALL:
                more = f'"type":"input_json_delta","partial_json":{quote(part.text)}'
        return (
            begun + _event("content_block_delta", f',"index":{self._index},"delta":{{{more}}}') if part.text else begun
        )

    def _open(self, part: Part) -> str:
        self._index += 1
        self._kind = part.kind
        match part.kind:
            case PartKind.TEXT:
                block = '"type":"text","text":""'
            case PartKind.REASONING:
                block = '"type":"thinking","thinking":"","signature":""'
            case PartKind.CALL:
                block = f'"type":"tool_use","id":{quote(part.call_id)},"name":{quote(part.name)},"input":{{}}'
        return _event("content_block_start", f',"index":{self._index},"content_block":{{{block}}}')

    def _close(self) -> str:
        if self._kind is None:
            return ""
        self._kind = None
        return _event("content_block_stop", f',"index":{self._index}')


class MessageDocument(Format):
    """The answer as one document. Arguments as for MessageStream."""

    def __init__(self, answer_id: str, model: str) -> None:
        self._head = f'"id":{quote(answer_id)},"type":"message","role":"assistant","model":{quote(model)}'
        self._parts: list[Part] = []

    def delta(self, prompt: int, delta: Delta) -> str:
        """Keep the values for the document."""
        for part in parts_of(delta):
            last = self._parts[-1] if self._parts else None
            if last is not None and part.kind is last.kind and not part.call_id:
                self._parts[-1] = last._replace(text=last.text + part.text)
            else:
                self._parts.append(part)
        return ""

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the document."""
        (last,) = finished
        blocks = [shown for part in self._parts if (shown := self._block(part))] or ['{"type":"text","text":""}']
        return (
            f'{{{self._head},"content":[{",".join(blocks)}],{_end(last.samples[0])},"usage":{_usage(last.usage)},'
            f'"latency":{latency_json(finished)}}}'
        )

    def _block(self, part: Part) -> str:
        """Return a part as a block; empty for a call that was cut off."""
        match part.kind:
            case PartKind.TEXT:
                return f'{{"type":"text","text":{quote(part.text)}}}'
            case PartKind.REASONING:
                return f'{{"type":"thinking","thinking":{quote(part.text)},"signature":""}}'
        if input_of(part.text) is None:
            return ""
        return f'{{"type":"tool_use","id":{quote(part.call_id)},"name":{quote(part.name)},"input":{part.text}}}'
