"""Answers of /v1/completions: choices of several prompts are numbered prompt by prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from scalellm.services.tokenizer.http.answer_format import Format
from scalellm.services.tokenizer.http.completion_request import CompletionRequest
from scalellm.services.tokenizer.http.logprobs import CompletionLogprobs, prompt_entries
from scalellm.services.tokenizer.http.stream_usage import StreamUsage
from scalellm.services.tokenizer.http.wire import (
    DONE,
    answer_head,
    dump,
    final_usage_json,
    finish_reason,
    latency_json,
    quote,
    stop_reason,
    total_usage,
)
from scalellm.services.tokenizer.sample_stream import Delta
from scalellm.services.tokenizer.text.detokenizer import TokenTexts
from scalellm.v1 import generation_pb2


class _Prompt:
    """The part of an answer that repeats one prompt: the beginning of its choices, and the fields beside the first.

    Args:
        request: The client's request.
        text: The prompt's text, if it is to be repeated.
        texts: Texts of the model's tokens.
    """

    def __init__(self, request: CompletionRequest, text: str, texts: TokenTexts) -> None:
        self.text = text
        self._parts: list[generation_pb2.PromptLogprobs] = []
        self._num_top = request.logprobs
        self._texts = texts
        self._is_shown = bool(request.echo)
        self._num_entries_top = request.prompt_logprobs
        self._ids = ""

    def start(self, started: generation_pb2.Started) -> None:
        """Note the prompt's token ids if the client asked for them."""
        if started.prompt_token_ids:
            self._ids = f',"prompt_token_ids":{dump(list(started.prompt_token_ids))}'

    def take_ids(self) -> str:
        """Return its token ids as a field of a choice, the first time."""
        ids, self._ids = self._ids, ""
        return ids

    def add(self, part: generation_pb2.PromptLogprobs) -> None:
        """Keep log-probabilities of a part of the prompt, if they are wanted."""
        if self._is_shown or self._num_entries_top is not None:
            self._parts.append(part)

    def entries(self, parts: Sequence[generation_pb2.PromptLogprobs] | None = None) -> str:
        """Return log-probabilities of some parts, or of all, as a field of a choice; empty if they are not wanted."""
        if self._num_entries_top is None:
            return ""
        parts = self._parts if parts is None else parts
        entries = (prompt_entries(part, self._texts, self._num_entries_top) for part in parts)
        return f',"prompt_logprobs":[{",".join(entries)}]'

    def logprobs(self) -> CompletionLogprobs | None:
        """Make the log-probabilities of one choice; None if they are not wanted."""
        if self._num_top is None:
            return None
        made = CompletionLogprobs(self._texts, self._num_top)
        if self._is_shown:
            for number, part in enumerate(self._parts):
                made.add(part.token_ids, part.logprobs, begins_text=number == 0)
        return made


class _Format(Format):
    """The common part of streams and documents.

    Args:
        request: The client's request.
        answer_id: Its id.
        model: Name of the model.
        texts: Texts of the model's tokens.
        echoes: Beginning of the choices of each prompt.
    """

    def __init__(
        self, request: CompletionRequest, answer_id: str, model: str, texts: TokenTexts, echoes: Sequence[str]
    ) -> None:
        self._request = request
        self._head = answer_head("text_completion", answer_id, model)
        self._prompts = [_Prompt(request, text, texts) for text in echoes]
        self._logprobs: dict[int, CompletionLogprobs | None] = {}
        self._shows_tokens = not request.is_prompt_alone

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Return no text: the prompt is sent with the first token."""
        self._prompts[prompt].start(started)
        return ""

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Keep the values for later."""
        self._prompts[prompt].add(part)
        return ""

    def _choice_of(self, prompt: int, index: int) -> int:
        return prompt * (self._request.n or 1) + index

    def _logprobs_of(self, prompt: int, choice: int) -> CompletionLogprobs | None:
        if choice not in self._logprobs:
            self._logprobs[choice] = self._prompts[prompt].logprobs()
        return self._logprobs[choice]

    def _ids_of(self, prompt: int, choice: int) -> str:
        """Return the prompt's token ids, for the first chunk of its first choice."""
        return self._prompts[prompt].take_ids() if choice == self._choice_of(prompt, 0) else ""

    def _usage_of(self, finished: Sequence[generation_pb2.Finished]) -> str:
        usage = total_usage(finished)
        if not self._shows_tokens:
            usage.completion_tokens = 0
        return final_usage_json(usage)

    def _end_of(self, sample: generation_pb2.SampleFinished) -> str:
        reason = finish_reason(sample) if self._shows_tokens else "length"
        return f'"finish_reason":"{reason}","stop_reason":{dump(stop_reason(sample))}'


class CompletionStream(_Format):
    """The answer as chunks. Arguments as for _Format."""

    def __init__(
        self, request: CompletionRequest, answer_id: str, model: str, texts: TokenTexts, echoes: Sequence[str]
    ) -> None:
        super().__init__(request, answer_id, model, texts, echoes)
        self._head = f"data: {self._head}"
        self._is_echo = bool(request.echo)
        self._usage = StreamUsage(request)
        self._is_plain = request.logprobs is None and not request.return_token_ids and not request.continuous_usage
        self._began: set[int] = set()

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Return no text: the prompt is sent with the first token."""
        self._usage.prompt_tokens += started.prompt_tokens
        return super().start(prompt, started)

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Return a chunk of the prompt's first choice, if vLLM's format is wanted. OpenAI's come with the
        first token.
        """
        if self._is_echo:
            super().prompt_logprobs(prompt, part)
        if not (entries := self._prompts[prompt].entries([part])):
            return ""
        choice = self._choice_of(prompt, 0)
        return (
            f'{self._head}{{"index":{choice},"text":"","logprobs":null{entries},"finish_reason":null}}]'
            f"{self._usage.shown()}}}\n\n"
        )

    def delta(self, prompt: int, delta: Delta) -> str:
        """Return a chunk with new tokens."""
        choice = self._choice_of(prompt, delta.index)
        text = delta.text if self._shows_tokens else ""
        if choice not in self._began:
            self._began.add(choice)
            text = self._prompts[prompt].text + text
        if self._is_plain:
            return f'{self._head}{{"index":{choice},"text":{quote(text)}{self._usage.plain_tail}'
        self._usage.completion_tokens += delta.num_tokens if self._shows_tokens else 0
        shown = "null"
        if (logprobs := self._logprobs_of(prompt, choice)) is not None:
            if self._shows_tokens and delta.logprobs is not None:
                logprobs.add(delta.token_ids, delta.logprobs)
            shown = logprobs.take()
        ids = f',"token_ids":{dump(delta.token_ids)}' if self._request.return_token_ids and self._shows_tokens else ""
        ids += self._ids_of(prompt, choice)
        return (
            f'{self._head}{{"index":{choice},"text":{quote(text)},"logprobs":{shown}{ids},'
            f'"finish_reason":null}}]{self._usage.shown()}}}\n\n'
        )

    def sample_end(self, prompt: int, sample: generation_pb2.SampleFinished) -> str:
        """Return the last chunk of a choice."""
        choice = self._choice_of(prompt, sample.index)
        text = "" if choice in self._began else self._prompts[prompt].text
        ids = self._ids_of(prompt, choice)
        return (
            f'{self._head}{{"index":{choice},"text":{quote(text)},"logprobs":null{ids},{self._end_of(sample)}}}]'
            f"{self._usage.shown()}}}\n\n"
        )

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the last events, with the usage."""
        if not self._request.includes_usage:
            return DONE
        usage = self._usage_of(finished)
        return f'{self._head}],"usage":{usage},"latency":{latency_json(finished)}}}\n\n{DONE}'


class CompletionDocument(_Format):
    """The answer as one document. Arguments as for _Format."""

    def __init__(
        self, request: CompletionRequest, answer_id: str, model: str, texts: TokenTexts, echoes: Sequence[str]
    ) -> None:
        super().__init__(request, answer_id, model, texts, echoes)
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._ids: defaultdict[int, list[int]] = defaultdict(list)

    def delta(self, prompt: int, delta: Delta) -> str:
        """Keep the values for later."""
        if not self._shows_tokens:
            return ""
        choice = self._choice_of(prompt, delta.index)
        self._texts[choice].append(delta.text)
        if self._request.return_token_ids:
            self._ids[choice] += delta.token_ids
        logprobs = self._logprobs_of(prompt, choice)
        if logprobs is not None and delta.logprobs is not None:
            logprobs.add(delta.token_ids, delta.logprobs)
        return ""

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """Return the document."""
        choices = ",".join(
            self._choice(prompt, sample) for prompt, one in enumerate(finished) for sample in one.samples
        )
        return f'{self._head}{choices}],"usage":{self._usage_of(finished)},"latency":{latency_json(finished)}}}'

    def _choice(self, prompt: int, sample: generation_pb2.SampleFinished) -> str:
        choice = self._choice_of(prompt, sample.index)
        text = self._prompts[prompt].text + "".join(self._texts[choice])
        logprobs = self._logprobs_of(prompt, choice)
        ids = f',"token_ids":{dump(self._ids[choice])}' if self._request.return_token_ids else ""
        ids += self._ids_of(prompt, choice)
        if choice == self._choice_of(prompt, 0):
            ids += self._prompts[prompt].entries()
        return (
            f'{{"index":{choice},"text":{quote(text)},"logprobs":{logprobs.take() if logprobs else "null"}{ids},'
            f"{self._end_of(sample)}}}"
        )
