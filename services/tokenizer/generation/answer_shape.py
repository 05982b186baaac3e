"""The shape of a request's answers: one grammar for tools, structured output and reasoning, and the splitters of
parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import grpc

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.dialect.constraint import AnswerGrammar
from scalellm.services.tokenizer.dialect.splitter import AnswerSplitter, make_splitter
from scalellm.services.tokenizer.reasoning_tokens import ReasoningTokens
from scalellm.services.tokenizer.structure import grammar_of
from scalellm.services.tokenizer.tools import ArgumentTexts, calls_of, offered
from scalellm.services.tokenizer.writing import Writing
from scalellm.v1 import generation_pb2, link_pb2


class AnswerShape:
    """The shape that a request asks of its answers. Raises StatusError for a shape that cannot be followed.

    Args:
        request: It passed validation.
        writing: The model's way of writing.
    """

    def __init__(self, request: generation_pb2.GenerateRequest, writing: Writing) -> None:
        self._writing = writing
        self._calls = calls_of(request.chat)
        self._shape = ""
        if request.HasField("structured_output"):
            self._shape = grammar_of(request.structured_output, writing.texts.special_ids)
        self._budget = request.reasoning.budget_tokens if request.reasoning.HasField("budget_tokens") else None
        self._grammar = AnswerGrammar(writing.dialect, writing.texts.special_ids, writing.added_ids, writing.end_ids)
        self._is_own = request.structured_output.WhichOneof("shape") == "lark"
        self._splits = splits(request)
        if self._calls is not None and not writing.dialect.tells_calls:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "chat.tools: how this model writes calls is not known: its chat template has none of the known marks",
                field="chat.tools",
            )
        if self._calls is not None and self._calls.are_required and self._shape:
            raise StatusError.invalid("structured_output", "must not be set where a call is required: there is no text")
        if self._is_own and (self._calls is not None or self._budget is not None):
            beside = "chat.tools" if self._calls is not None else "reasoning.budget_tokens"
            raise StatusError.invalid("structured_output.lark", f"must not be set beside {beside}")
        if self._budget is not None and not writing.can_count_reasoning:
            raise StatusError.invalid(
                "reasoning.budget_tokens", "is not supported: this model has no token that ends its reasoning"
            )

    def grammar(self, prompt_ids: Sequence[int]) -> str:
        """Return the grammar of the answers to a prompt, empty if they may be any text. Raises StatusError.

        Args:
            prompt_ids: The prompt. If it ends in a mark of reasoning, answers begin after that mark.
        """
        if self._is_own or not self._splits:
            return self._shape
        return self._grammar.of(self._calls, self._shape, self._writing.opening(prompt_ids), self._budget)


def tell_apart(request: generation_pb2.GenerateRequest, writing: Writing) -> None:
    """Change a request so that reasoning and text are told apart, if the model's answers always consist of several
    parts.
    """
    if writing.dialect.channels is not None and request.HasField("chat"):
        request.reasoning.SetInParent()


def splits(request: generation_pb2.GenerateRequest) -> bool:
    """Return whether reasoning, text and calls are told apart."""
    return request.HasField("reasoning") or bool(offered(request.chat))


def make_splitters(
    request: generation_pb2.GenerateRequest, submit: link_pb2.Submit, writing: Writing
) -> list[AnswerSplitter] | None:
    """Make the splitter of each sample's parts; None if the whole answer is text.

    Args:
        request: The client's request.
        submit: The Submit made of it.
        writing: The model's way of writing.
    """
    if not splits(request):
        return None
    opening, texts = writing.opening(submit.token_ids), ArgumentTexts(request.chat)
    has_calls = bool(offered(request.chat)) and request.structured_output.WhichOneof("shape") != "lark"
    return [
        make_splitter(
            writing.dialect,
            opening,
            has_calls=has_calls,
            make_id=_CallIds(submit.request_id, index, is_short=writing.dialect.short_ids),
            texts_of=texts.of,
        )
        for index in range(submit.sampling.n)
    ]


def make_counters(
    request: generation_pb2.GenerateRequest, submit: link_pb2.Submit, writing: Writing
) -> list[ReasoningTokens] | None:
    """Make the counter of each sample's reasoning tokens; None if reasoning is not told apart, or cannot be counted.

    Arguments are those of make_splitters.
    """
    splitters = make_splitters(request, submit, writing) if writing.can_count_reasoning else None
    if splitters is None:
        return None
    texts = writing.marked_texts.after(submit.token_ids)
    return [ReasoningTokens(splitter, texts.detokenizer()) for splitter in splitters]


class _CallIds:
    """Derives the ids of calls from the request, so that a resumed stream has the same ones.

    Args:
        request_id: Id of the request.
        sample: Index of the sample.
        is_short: True for ids of nine letters and digits.
    """

    def __init__(self, request_id: str, sample: int, *, is_short: bool) -> None:
        self._begin = f"{request_id}/{sample}/"
        self._is_short = is_short

    def __call__(self, number: int) -> str:
        digest = hashlib.sha256(f"{self._begin}{number}".encode()).hexdigest()
        return digest[:9] if self._is_short else f"call_{digest[:24]}"
