"""Answers of /v1/completions: choices of several prompts are numbered prompt by prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from scalellm.v1 import generation_pb2
from services.tokenizer.http.completion_request import CompletionRequest
from services.tokenizer.http.logprobs import CompletionLogprobs
from services.tokenizer.http.wire import (
    DONE,
    answer_head,
    dump,
    finish_reason,
    latency_json,
    quote,
    stop_reason,
    total_usage,
    usage_json,
)
from services.tokenizer.sample_stream import Delta
from services.tokenizer.text.detokenizer import TokenTexts


class _Echo:
    """What the choices of one prompt begin with, where that is wanted.

    Args:
        request: What was asked.
        text: The prompt's, where it is wanted.
        texts: What tokens mean.
    """

    def __init__(self, request: CompletionRequest, text: str, texts: TokenTexts) -> None:
        self.text = text
        self._parts: list[generation_pb2.PromptLogprobs] = []
        self._num_top = request.logprobs
        self._texts = texts
        self._is_shown = bool(request.echo)

    def add(self, part: generation_pb2.PromptLogprobs) -> None:
        """Log-probabilities of a part of it."""
        self._parts.append(part)

    def logprobs(self) -> CompletionLogprobs | None:
        """Begin the log-probabilities of one choice; None where none are wanted."""
        if self._num_top is None:
            return None
        made = CompletionLogprobs(self._texts, self._num_top)
        if self._is_shown:
            for number, part in enumerate(self._parts):
                made.add(part.token_ids, part.logprobs, begins_text=number == 0)
        return made


class _Format:
    """What streams and documents have in common.

    Args:
        request: What was asked.
        answer_id: Its id.
        model: Name of the model.
        texts: What tokens mean.
        echoes: What the choices of each prompt begin with.
    """

    def __init__(
        self, request: CompletionRequest, answer_id: str, model: str, texts: TokenTexts, echoes: Sequence[str]
    ) -> None:
        self._request = request
        self._head = answer_head("text_completion", answer_id, model)
        self._echoes = [_Echo(request, text, texts) for text in echoes]
        self._logprobs: dict[int, CompletionLogprobs | None] = {}
        self._shows_tokens = not request.is_prompt_alone

    def prompt_logprobs(self, prompt: int, part: generation_pb2.PromptLogprobs) -> str:
        """Kept until the first token."""
        self._echoes[prompt].add(part)
        return ""

    def _choice_of(self, prompt: int, index: int) -> int:
        return prompt * (self._request.n or 1) + index

    def _samples(
        self, finished: Sequence[generation_pb2.Finished]
    ) -> list[tuple[int, int, generation_pb2.SampleFinished]]:
        """Prompt, choice and end of each sample."""
        return [
            (prompt, self._choice_of(prompt, sample.index), sample)
            for prompt, one in enumerate(finished)
            for sample in one.samples
        ]

    def _logprobs_of(self, prompt: int, choice: int) -> CompletionLogprobs | None:
        if choice not in self._logprobs:
            self._logprobs[choice] = self._echoes[prompt].logprobs()
        return self._logprobs[choice]

    def _usage_of(self, finished: Sequence[generation_pb2.Finished]) -> str:
        usage = total_usage(finished)
        completion = usage.completion_tokens if self._shows_tokens else 0
        return usage_json(usage.prompt_tokens, completion, usage.cached_tokens)

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
        usage = ',"usage":null' if request.includes_usage else ""
        self._tail = f',"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'
        self._is_plain = request.logprobs is None and not request.return_token_ids and not request.continuous_usage
        self._prompt_tokens = self._tokens = 0
        self._began: set[int] = set()

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Nothing: the prompt is repeated with the first token."""
        self._prompt_tokens += started.prompt_tokens
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """A chunk."""
        choice = self._choice_of(prompt, delta.index)
        text = delta.text if self._shows_tokens else ""
        if choice not in self._began:
            self._began.add(choice)
            text = self._echoes[prompt].text + text
        if self._is_plain:
            return f'{self._head}{{"index":{choice},"text":{quote(text)}{self._tail}'
        self._tokens += delta.num_tokens if self._shows_tokens else 0
        shown = "null"
        if (logprobs := self._logprobs_of(prompt, choice)) is not None:
            if self._shows_tokens and delta.logprobs is not None:
                logprobs.add(delta.token_ids, delta.logprobs)
            shown = logprobs.take()
        ids = f',"token_ids":{dump(delta.token_ids)}' if self._request.return_token_ids and self._shows_tokens else ""
        return (
            f'{self._head}{{"index":{choice},"text":{quote(text)},"logprobs":{shown}{ids},'
            f'"finish_reason":null}}]{self._usage()}}}\n\n'
        )

    def end(self, finished: Sequence[generation_pb2.Finished]) -> str:
        """How each choice ended, the usage, and the end."""
        parts = []
        for prompt, choice, sample in self._samples(finished):
            text = "" if choice in self._began else self._echoes[prompt].text
            parts.append(
                f'{self._head}{{"index":{choice},"text":{quote(text)},"logprobs":null,{self._end_of(sample)}}}]'
                f"{self._usage()}}}\n\n"
            )
        if self._request.includes_usage:
            usage = self._usage_of(finished)
            parts.append(f'{self._head}],"usage":{usage},"latency":{latency_json(finished)}}}\n\n')
        return "".join(parts) + DONE

    def _usage(self) -> str:
        if self._request.continuous_usage:
            return f',"usage":{usage_json(self._prompt_tokens, self._tokens)}'
        return ',"usage":null' if self._request.includes_usage else ""


class CompletionDocument(_Format):
    """The answer in one. Arguments as for _Format."""

    def __init__(
        self, request: CompletionRequest, answer_id: str, model: str, texts: TokenTexts, echoes: Sequence[str]
    ) -> None:
        super().__init__(request, answer_id, model, texts, echoes)
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._ids: defaultdict[int, list[int]] = defaultdict(list)

    def start(self, prompt: int, started: generation_pb2.Started) -> str:
        """Nothing."""
        return ""

    def delta(self, prompt: int, delta: Delta) -> str:
        """Kept."""
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
        """The document."""
        choices = ",".join(self._choice(prompt, choice, sample) for prompt, choice, sample in self._samples(finished))
        return f'{self._head}{choices}],"usage":{self._usage_of(finished)},"latency":{latency_json(finished)}}}'

    def _choice(self, prompt: int, choice: int, sample: generation_pb2.SampleFinished) -> str:
        text = self._echoes[prompt].text + "".join(self._texts[choice])
        logprobs = self._logprobs_of(prompt, choice)
        ids = f',"token_ids":{dump(self._ids[choice])}' if self._request.return_token_ids else ""
        return (
            f'{{"index":{choice},"text":{quote(text)},"logprobs":{logprobs.take() if logprobs else "null"}{ids},'
            f"{self._end_of(sample)}}}"
        )
