"""The conversion of one sample's tokens to the deltas that its client sees. Pure: no gRPC, no clock.

The result depends on the tokens alone, not on how they were batched: text, token counts and stop reasons are the same
whether tokens come one by one or all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scalellm.services.common.link import cut_logprobs
from scalellm.services.tokenizer.dialect import Part, PartKind
from scalellm.services.tokenizer.dialect.splitter import AnswerSplitter
from scalellm.services.tokenizer.reasoning_tokens import ReasoningTokens
from scalellm.services.tokenizer.text.detokenizer import Detokenizer, TokenTexts
from scalellm.services.tokenizer.text.stop_strings import StopStrings
from scalellm.services.tokenizer.text.text_stream import TextStream
from scalellm.services.tokenizer.token_receiver import TokenBatch
from scalellm.v1 import common_pb2, generation_pb2


@dataclass(slots=True)
class Delta:
    """New tokens of one sample, as its client sees them. A plain class, which costs less than a protobuf message.

    Attributes:
        index: The sample.
        text: New text; empty if none is wanted, or while a character or a possible stop text is incomplete.
        offset: Number of tokens of the sample before these.
        num_tokens: Number of new tokens.
        parts: New reasoning, text and calls; None if they are not told apart. `text` is the text in them.
        token_ids: Ids of the new tokens, if requested.
        logprobs: One entry per token, if requested.
        finished: The end of the sample, in its last delta.
    """

    index: int
    text: str
    offset: int
    num_tokens: int
    token_ids: Sequence[int] = ()
    logprobs: common_pb2.TokenLogprobs | None = None
    parts: Sequence[Part] | None = None
    finished: generation_pb2.SampleFinished | None = None


def parts_of(delta: Delta) -> Sequence[Part]:
    """Return the new parts in order. If reasoning and calls are not told apart, there is one part with the text."""
    if delta.parts is not None:
        return delta.parts
    return [Part(PartKind.TEXT, delta.text)] if delta.text else []


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """The parts of an answer that a client wants to see.

    Attributes:
        text: True if deltas carry text.
        token_ids: True if deltas carry token ids.
        skip_special_tokens: True if special tokens are left out of the text.
        include_stop: True if the stop text stays in the text.
        min_tokens: Tokens of which none completes a stop text.
        logprobs: True if deltas carry log-probabilities.
        keep_answer: True if text, parts and token ids are also kept for a session.
        reasoning: True if parts that are reasoning are shown.
    """

    text: bool = True
    token_ids: bool = False
    skip_special_tokens: bool = True
    include_stop: bool = False
    min_tokens: int = 0
    logprobs: bool = False
    keep_answer: bool = False
    reasoning: bool = True

    @classmethod
    def from_request(cls, request: generation_pb2.GenerateRequest) -> OutputOptions:
        """Return the options of a request, with defaults filled in."""
        return cls(
            text=request.output != generation_pb2.OUTPUT_TOKEN_IDS,
            token_ids=request.output in (generation_pb2.OUTPUT_TOKEN_IDS, generation_pb2.OUTPUT_TEXT_AND_TOKEN_IDS),
            skip_special_tokens=not request.HasField("skip_special_tokens") or request.skip_special_tokens,
            include_stop=request.include_stop,
            min_tokens=request.sampling.min_tokens,
            logprobs=request.sampling.HasField("logprobs"),
            keep_answer=request.HasField("session_id"),
            reasoning=not request.reasoning.HasField("include") or request.reasoning.include,
        )


class SampleStream:
    """One sample: detokenised, cut at its stop string, counted.

    Args:
        index: The sample.
        options: Parts of the answer that the client wants to see.
        texts: Texts of the model's tokens.
        stops: Stop strings, or None without any.
        splitter: Splits reasoning, text and calls; None if the whole answer is text.
        reasoning: Counts the tokens of reasoning; None if they cannot be counted.

    Attributes:
        num_tokens: Tokens shown so far.
        ended: Its end; None while it runs.
        answer_text: All text so far, when kept.
        answer_parts: All parts so far, when kept.
        answer_ids: All token ids so far, when kept.
    """

    def __init__(
        self,
        index: int,
        options: OutputOptions,
        texts: TokenTexts,
        stops: StopStrings | None = None,
        splitter: AnswerSplitter | None = None,
        reasoning: ReasoningTokens | None = None,
    ) -> None:
        self._index = index
        self._options = options
        self._splitter = splitter
        self._reasoning = reasoning
        self._text: TextStream | None = None
        self._detokenizer: Detokenizer | None = None
        if stops is not None:
            self._text = TextStream(
                texts,
                stops,
                skip_special_tokens=options.skip_special_tokens,
                include_stop=options.include_stop,
                min_tokens=options.min_tokens,
            )
        elif options.text or options.keep_answer:
            self._detokenizer = texts.detokenizer(skip_special_tokens=options.skip_special_tokens)
        self.num_tokens = 0
        self.ended: generation_pb2.SampleFinished | None = None
        self.answer_text: list[str] = []
        self.answer_parts: list[Part] = []
        self.answer_ids: list[int] = []

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Tokens of reasoning so far; None if they cannot be counted."""
        return self._reasoning.count if self._reasoning is not None else None

    def push(self, batch: TokenBatch) -> Delta | None:
        """Return the delta of a batch, or None if the client sees nothing new. After the sample's end it is always
        None.
        """
        if self.ended is not None:
            return None
        token_ids, finish = batch.token_ids, batch.finish
        if finish is None and self._detokenizer is not None:
            # The usual case.
            text, parts = self._read(self._detokenizer, token_ids)
            return self._respond(batch, text, parts, len(token_ids))
        # The stop token that ended the sample counts as a token of the answer, but has no text in it.
        hides_last = (
            finish is not None
            and finish.HasField("stop_token_id")
            and token_ids[-1:] == [finish.stop_token_id]
            and not (self._text is not None and self._text.is_stop(finish.stop_token_id))
        )
        shown = token_ids[:-1] if hides_last else token_ids
        num_tokens, text, stop = len(token_ids), "", None
        parts = []
        if self._detokenizer is not None:
            text, parts = self._read(self._detokenizer, shown)
            rest_text = self._detokenizer.flush()
            text += rest_text
            parts += self._split(rest_text)
        elif self._text is not None:
            delta = self._text.push(shown)
            text, stop = delta.text, delta.stop
            if stop is not None:
                num_tokens = delta.num_tokens
            elif finish is not None:
                rest = self._text.flush()
                text, stop = text + rest.text, rest.stop
            parts = self._split(text)
        if self._reasoning is not None and self._detokenizer is None:
            self._reasoning.push(shown[:num_tokens])
        if stop is not None:
            self.ended = generation_pb2.SampleFinished(
                index=self._index, reason=common_pb2.FINISH_REASON_STOP, stop=stop
            )
        elif finish is not None:
            self.ended = generation_pb2.SampleFinished(index=self._index, reason=finish.reason)
            if finish.HasField("stop_token_id"):
                self.ended.stop_token_id = finish.stop_token_id
        return self._respond(batch, text, parts, num_tokens)

    def _read(self, detokenizer: Detokenizer, token_ids: Sequence[int]) -> tuple[str, list[Part]]:
        """Return the text of tokens, and its parts if they are told apart."""
        if self._reasoning is not None and self._splitter is not None:
            return self._reasoning.read(token_ids, detokenizer, self._splitter)
        text = detokenizer.push(token_ids)
        return text, self._split(text)

    def _split(self, text: str) -> list[Part]:
        return self._splitter.push(text) if self._splitter is not None else []

    def _respond(self, batch: TokenBatch, text: str, parts: list[Part], num_tokens: int) -> Delta | None:
        options = self._options
        if self._splitter is not None and self.ended is not None:
            parts += self._splitter.flush()
            self.ended.num_tool_calls = self._splitter.num_calls
        token_ids = batch.token_ids if num_tokens == len(batch.token_ids) else batch.token_ids[:num_tokens]
        if options.keep_answer:
            self.answer_text.append(text)
            self.answer_parts += parts
            self.answer_ids += token_ids
        if not options.text:
            text, parts = "", []
        elif self._splitter is not None:
            text = "".join([part.text for part in parts if part.kind is PartKind.TEXT])
            if not options.reasoning:
                parts = [part for part in parts if part.kind is not PartKind.REASONING]
        if not num_tokens and not text and not parts and self.ended is None:
            return None
        delta = Delta(self._index, text, self.num_tokens, num_tokens, finished=self.ended)
        if self._splitter is not None and options.text:
            delta.parts = parts
        if options.token_ids:
            delta.token_ids = token_ids
        if options.logprobs and batch.logprobs is not None:
            delta.logprobs = cut_logprobs(batch.logprobs, 0, num_tokens)
        self.num_tokens += num_tokens
        return delta
