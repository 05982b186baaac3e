"""Answers of Anthropic's /v1/messages."""

from __future__ import annotations

from collections.abc import Sequence

from scalellm.v1 import common_pb2, generation_pb2
from services.tokenizer.http.wire import dump, latency_json, quote
from services.tokenizer.sample_stream import Delta


def _event(name: str, rest: str) -> str:
    return f'event: {name}\ndata: {{"type":"{name}"{rest}}}\n\n'


def _usage(usage: common_pb2.Usage) -> str:
    # What was read from the cache is counted apart.
    fresh = usage.prompt_tokens - usage.cached_tokens
    return (
        f'{{"input_tokens":{fresh},"cache_creation_input_tokens":0,"cache_read_input_tokens":{usage.cached_tokens},'
        f'"output_tokens":{usage.completion_tokens}}}'
    )


def _end(sample: generation_pb2.SampleFinished) -> str:
    if sample.reason == common_pb2.FINISH_REASON_LENGTH:
        return '"stop_reason":"max_tokens","stop_sequence":null'
    if sample.WhichOneof("matched") == "stop":
        return f'"stop_reason":"stop_sequence","stop_sequence":{dump(sample.stop)}'
    return '"stop_reason":"end_turn","stop_sequence":null'


class MessageStream:
    """The answer as events.

    Args:
        answer_id: Its id.
        model: Name of the model.
    """

    def __init__(self, answer_id: str, model: str) -> None:
        self._head = f'"id":{quote(answer_id)},"type":"message","role":"assistant","model":{quote(model)}'

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """The message begins, and its only block."""
        usage = _usage(common_pb2.Usage(prompt_tokens=started.prompt_tokens))
        message = f'{{{self._head},"content":[],"stop_reason":null,"stop_sequence":null,"usage":{usage}}}'
        block = ',"index":0,"content_block":{"type":"text","text":""}'
        return _event("message_start", f',"message":{message}') + _event("content_block_start", block)

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Nobody asks for them."""
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """More text."""
        if not delta.text:
            return ""
        return (
            'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
            f'{{"type":"text_delta","text":{quote(delta.text)}}}}}\n\n'
        )

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """The block ends, and the message."""
        (last,) = finished
        rest = f',"delta":{{{_end(last.samples[0])}}},"usage":{_usage(last.usage)},"latency":{latency_json(finished)}'
        return _event("content_block_stop", ',"index":0') + _event("message_delta", rest) + _event("message_stop", "")


class MessageDocument:
    """The answer in one. Arguments as for MessageStream."""

    def __init__(self, answer_id: str, model: str) -> None:
        self._head = f'"id":{quote(answer_id)},"type":"message","role":"assistant","model":{quote(model)}'
        self._parts: list[str] = []

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Nothing."""
        return ""

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Nobody asks for them."""
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """Kept."""
        self._parts.append(delta.text)
        return ""

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """The document."""
        (last,) = finished
        content = f'[{{"type":"text","text":{quote("".join(self._parts))}}}]'
        return (
            f'{{{self._head},"content":{content},{_end(last.samples[0])},"usage":{_usage(last.usage)},'
            f'"latency":{latency_json(finished)}}}'
        )
