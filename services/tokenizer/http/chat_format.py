"""Answers of /v1/chat/completions. A token's chunk is a fixed head, its text as a JSON string, and a fixed tail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from scalellm.services.tokenizer.dialect import Part
from scalellm.services.tokenizer.http.answer_format import Format
from scalellm.services.tokenizer.http.chat_parts import message_json, part_json
from scalellm.services.tokenizer.http.chat_request import ChatRequest
from scalellm.services.tokenizer.http.logprobs import chat_entries, prompt_entries
from scalellm.services.tokenizer.http.stream_usage import StreamUsage
from scalellm.services.tokenizer.http.wire import (
    DONE,
    answer_head,
    dump,
    final_usage_json,
    finish_reason,
    latency_json,
    quote,
    session_json,
    stop_reason,
)
from scalellm.services.tokenizer.message import Message
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.v1 import generation_pb2


class ChatStream(Format):
    """The answer as chunks.

    Args:
        request: The client's request.
        answer_id: Its id.
        model: Name of the model.
        texts: Texts of the model's tokens.
        echo: Text with which each choice's content begins.
    """

    def __init__(self, request: ChatRequest, answer_id: str, model: str, texts: TokenTexts, echo: str) -> None:
        self._request = request
        self._texts = texts
        self._echo = quote(echo)
        self._head = "data: " + answer_head("chat.completion.chunk", answer_id, model)
        self._heads: list[str] = []
        self._usage = StreamUsage(request)
        self._is_plain = not (request.logprobs or request.return_token_ids or request.continuous_usage)
        self._began: list[bool] = []
        self._prompt_ids = ""

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Return no text: the first chunk is sent with the first token, since clients measure latency by it."""
        count = self._request.n or 1  # which is within bounds now
        self._heads = [f'{self._head}{{"index":{index},"delta":{{' for index in range(count)]
        self._began = [False] * count
        self._usage.prompt_tokens = started.prompt_tokens
        if self._request.return_token_ids:
            self._prompt_ids = f',"prompt_token_ids":{dump(list(started.prompt_token_ids))}'
        return ""

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Return a chunk without a choice."""
        entries = prompt_entries(part, self._texts, self._request.prompt_logprobs or 0)
        return f'{self._head}],"prompt_logprobs":[{entries}]{self._usage.shown()}}}\n\n'

    def delta(self, prompt: int, delta: Delta) -> str:
        """Return a chunk with new tokens."""
        index = delta.index
        self._usage.completion_tokens += delta.num_tokens
        if delta.parts is not None:
            chunk = self._parts(delta, delta.parts)
        elif self._is_plain:  # almost always
            chunk = f'{self._heads[index]}"content":{quote(delta.text)}}}{self._usage.plain_tail}'
        else:
            chunk = self._rich(delta, f'"content":{quote(delta.text)}')
        return chunk if self._began[index] or not chunk else self._role(index) + chunk

    def _parts(self, delta: Delta, parts: Sequence[Part]) -> str:
        """Return a chunk for each part. Log-probabilities and token ids are in the first, even if there is no part."""
        told = list(map(part_json, parts))
        first = "" if self._is_plain else self._rich(delta, told.pop(0) if told else "")
        return first + "".join([f"{self._heads[delta.index]}{part}}}{self._usage.plain_tail}" for part in told])

    def sample_end(self, prompt: int, sample: generation_pb2.SampleFinished) -> str:
        """Return the last chunk of a choice."""
        index = sample.index
        role = "" if self._began[index] else self._role(index)
        reason = f'"finish_reason":"{finish_reason(sample)}","stop_reason":{dump(stop_reason(sample))}'
        return (
            f'{role}{self._head}{{"index":{index},"delta":{{}},"logprobs":null,{reason}}}]{self._usage.shown()}}}\n\n'
        )

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the last events, with the usage."""
        if not self._request.includes_usage:
            return DONE
        (last,) = finished
        rest = f'"latency":{latency_json(finished)}{session_json(last)}'
        return f'{self._head}],"usage":{final_usage_json(last.usage)},{rest}}}\n\n{DONE}'

    def _role(self, index: int) -> str:
        self._began[index] = True
        return (
            f'{self._head}{{"index":{index},"delta":{{"role":"assistant","content":{self._echo}}},"logprobs":null,'
            f'"finish_reason":null}}]{self._prompt_ids}{self._usage.shown()}}}\n\n'
        )

    def _rich(self, delta: Delta, told: str) -> str:
        logprobs = "null"
        if self._request.logprobs and delta.logprobs is not None:
            num_top = self._request.top_logprobs or 0
            logprobs = (
                f'{{"content":[{chat_entries(delta.token_ids, delta.logprobs, self._texts, num_top)}],"refusal":null}}'
            )
        ids = f',"token_ids":{dump(delta.token_ids)}' if self._request.return_token_ids else ""
        return (
            f'{self._heads[delta.index]}{told}}},"logprobs":{logprobs}{ids},'
            f'"finish_reason":null}}]{self._usage.shown()}}}\n\n'
        )


class ChatDocument(Format):
    """The answer as one document. Arguments as for ChatStream."""

    def __init__(self, request: ChatRequest, answer_id: str, model: str, texts: TokenTexts, echo: str) -> None:
        self._request = request
        self._texts = texts
        self._echo = echo
        self._head = answer_head("chat.completion", answer_id, model)
        self._contents: defaultdict[int, list[str]] = defaultdict(list)
        self._parts: defaultdict[int, list[Part]] = defaultdict(list)
        self._logprobs: defaultdict[int, list[str]] = defaultdict(list)
        self._ids: defaultdict[int, list[int]] = defaultdict(list)
        self._prompt: list[str] = []
        self._prompt_ids = ""

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Keep the prompt's token ids, if they are wanted."""
        if self._request.return_token_ids:
            self._prompt_ids = f',"prompt_token_ids":{dump(list(started.prompt_token_ids))}'
        return ""

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Keep the values for the document."""
        num_top = self._request.prompt_logprobs or 0
        self._prompt.append(prompt_entries(part, self._texts, num_top))
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """Keep the values for the document."""
        self._contents[delta.index].append(delta.text)
        if delta.parts is not None:
            self._parts[delta.index] += delta.parts
        if self._request.return_token_ids:
            self._ids[delta.index] += delta.token_ids
        if self._request.logprobs and delta.logprobs is not None and delta.token_ids:
            num_top = self._request.top_logprobs or 0
            self._logprobs[delta.index].append(chat_entries(delta.token_ids, delta.logprobs, self._texts, num_top))
        return ""

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the document."""
        (last,) = finished
        shown = final_usage_json(last.usage)
        choices = ",".join(map(self._choice, last.samples))
        prompt = f',"prompt_logprobs":[{",".join(self._prompt)}]' if self._prompt else ""
        rest = f'"latency":{latency_json(finished)}{session_json(last)}{prompt}{self._prompt_ids}'
        return f'{self._head}{choices}],"usage":{shown},{rest}}}'

    def _choice(self, sample: generation_pb2.SampleFinished) -> str:
        index = sample.index
        text = self._echo + "".join(self._contents[index])
        said = message_json(Message.answer(self._parts[index]))
        content = quote(text) if text or not said else "null"
        logprobs = "null"
        if self._request.logprobs:
            logprobs = f'{{"content":[{",".join(self._logprobs[index])}],"refusal":null}}'
        ids = f',"token_ids":{dump(self._ids[index])}' if self._request.return_token_ids else ""
        return (
            f'{{"index":{index},"message":{{"role":"assistant","content":{content},"refusal":null{said}}},'
            f'"logprobs":{logprobs},"finish_reason":"{finish_reason(sample)}",'
            f'"stop_reason":{dump(stop_reason(sample))}{ids}}}'
        )
