"""Encoding of text to token ids without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self, TypeVar

from tokenizers import Tokenizer

from scalellm.services.tokenizer.text.content_as_text import MarkedText, SpecialTexts
from scalellm.services.tokenizer.text.token_bound import TokenBound
from scalellm.services.tokenizer.text.turns import Job, Turns

INLINE_CHARS = 1024
"""Longest text, in characters, that is encoded on the event loop, at about 0.3 us per character. Passing a text to the
thread costs 50-100 us, and the thread holds the GIL for part of its work anyway."""

BATCH_CHARS = 1 << 16
"""Most characters of a batch, which take about 20 ms, because all texts of a batch are answered together."""


ResultT = TypeVar("ResultT")


class TooManyTokensError(Exception):
    """A text was not encoded because it has more tokens than its caller allows.

    Attributes:
        at_least: Lower bound of its number of tokens.
    """

    def __init__(self, at_least: int) -> None:
        super().__init__(f"the text has at least {at_least} tokens")
        self.at_least = at_least


class TokenizerPanicError(Exception):
    """The tokenizers library panicked on a text, which is a fault of the library and affects no other text."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Work(Job):
    work: Callable[[], Any]


@dataclass(slots=True, eq=False, kw_only=True)
class _Encoding(Job):
    text: str
    add_special_tokens: bool
    max_tokens: int | None


class EncodeBatcher:
    """Encodes the texts of concurrent callers in batches, in one thread. Use as an async context manager.

    The next batch is collected while one is being encoded, so no text waits for a batch to fill. The tokenizer is only
    read: truncation and padding are never changed. Callers take turns, and one that is cancelled before its batch
    starts costs nothing.

    Attributes:
        num_panics: Number of texts on which the tokenizers library panicked.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._jobs: Turns[_Encoding | _Work] = Turns()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._worker: asyncio.Task[None] | None = None
        self.num_panics = 0

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._worker is not None
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        self._jobs.cancel_all()
        self._thread.shutdown()

    @property
    def is_working(self) -> bool:
        """True while long texts can be encoded; false once that has failed for good."""
        return self._worker is not None and not self._worker.done()

    async def encode(
        self, text: str, *, caller: str = "", add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Return the token ids of `text`; special tokens written in it are recognised.

        Args:
            text: The text.
            caller: Name of the tenant whose turn a long text takes.
            add_special_tokens: Put the model's own tokens around it, usually one for the beginning: right for a plain
                prompt, wrong for a rendered chat template, which writes them itself.
            max_tokens: Do not encode a text that certainly has more tokens.

        Raises:
            TooManyTokensError: See `max_tokens`; a text with more tokens may also be encoded.
            TokenizerPanicError: The library failed.
        """
        if len(text) <= INLINE_CHARS:
            try:
                return _encode(self._tokenizer, [text], add_special_tokens)[0]
            except TokenizerPanicError:
                self.num_panics += 1
                raise
        job = _Encoding(caller=caller, text=text, add_special_tokens=add_special_tokens, max_tokens=max_tokens)
        ids: list[int] = await self._jobs.finish(job)
        return ids

    async def encode_marked(self, text: MarkedText, *, caller: str, max_tokens: int) -> list[int]:
        """Return the token ids of a text in which only unmarked special tokens' texts are special tokens.

        Raises as `encode` does.
        """
        return await self.run(caller, partial(self._encode_marked, text, max_tokens))

    async def run(self, caller: str, work: Callable[[], ResultT]) -> ResultT:
        """Run other long work on text in the same thread when it is the caller's turn, and return its result."""
        result: ResultT = await self._jobs.finish(_Work(caller=caller, work=work))
        return result

    @cached_property
    def _bound(self) -> TokenBound:
        # Made for the first text that may be too long, because it takes a second for a large vocabulary.
        return TokenBound(self._tokenizer)

    @cached_property
    def special_texts(self) -> SpecialTexts:
        """The tokenizer's special tokens."""
        return SpecialTexts(self._tokenizer)

    @cached_property
    def _text_tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer that encodes special tokens' texts as plain text. Made for the first chat that needs
        it.
        """
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _encode_marked(self, text: MarkedText, max_tokens: int) -> list[int]:
        """Encode a text with marks; runs in the thread."""
        self._check_bound(text.plain, max_tokens)
        parts = self.special_texts.split(text)
        texts = [part for part in parts if isinstance(part, str)]
        encoded = iter(_encode(self._text_tokenizer, texts, False))
        return [token_id for part in parts for token_id in ((part,) if isinstance(part, int) else next(encoded))]

    def _check_bound(self, text: str, max_tokens: int) -> None:
        # Every token has at least one character.
        if len(text) > max_tokens and (at_least := self._bound.at_least(text)) > max_tokens:
            raise TooManyTokensError(at_least)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            first = await self._jobs.take()
            batch: Sequence[Job] = [first]
            if isinstance(first, _Work):
                do: Callable[[], Sequence[Any]] = partial(_do, first)
            else:
                texts = self._take_batch(first)
                batch, do = texts, partial(self._encode_batch, texts)
            try:
                results = await loop.run_in_executor(self._thread, do)
            except asyncio.CancelledError:
                for job in batch:
                    job.result.cancel()
                raise
            except Exception as error:
                results = [error] * len(batch)
            for job, result in zip(batch, results, strict=True):
                self.num_panics += isinstance(result, TokenizerPanicError)
                if job.result.done():  # the caller has left
                    continue
                if isinstance(result, Exception):
                    job.result.set_exception(result)
                else:
                    job.result.set_result(result)

    def _take_batch(self, first: _Encoding) -> list[_Encoding]:
        """Remove the next texts from the queue, as long as they have the same options and the batch stays small."""
        batch, chars = [first], len(first.text)
        while isinstance(job := self._jobs.peek(), _Encoding):
            chars += len(job.text)
            if chars > BATCH_CHARS or job.add_special_tokens != first.add_special_tokens:
                break
            batch.append(job)
            self._jobs.pop()
        return batch

    def _encode_batch(self, batch: Sequence[_Encoding]) -> Sequence[list[int] | Exception]:
        """Return the token ids of each text, or its exception. Runs in the thread."""
        results: dict[int, list[int] | Exception] = {}
        for index, job in enumerate(batch):
            if job.max_tokens is not None:
                try:
                    self._check_bound(job.text, job.max_tokens)
                except TooManyTokensError as error:
                    results[index] = error
        rest = [index for index in range(len(batch)) if index not in results]
        adds_special = batch[0].add_special_tokens
        try:
            encoded: Sequence[list[int] | Exception] = _encode(
                self._tokenizer, [batch[index].text for index in rest], adds_special
            )
        except Exception:
            encoded = [self._encode_alone(batch[index].text, adds_special) for index in rest]
        results |= dict(zip(rest, encoded, strict=True))
        return [results[index] for index in range(len(batch))]

    def _encode_alone(self, text: str, add_special_tokens: bool) -> list[int] | Exception:
        """Encode one text of a batch that failed, because only one of its texts may be at fault."""
        try:
            return _encode(self._tokenizer, [text], add_special_tokens)[0]
        except Exception as error:
            return error


def _do(job: _Work) -> Sequence[Any]:
    return [job.work()]


def _encode(tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    # The batch call is used even for one text, because it skips the character offsets, about a fifth of the work.
    try:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    except BaseException as error:
        # A panic in Rust is not an Exception, and would end the task that waits for it.
        if type(error).__name__ == "PanicException":
            raise TokenizerPanicError(f"the tokenizers library panicked: {error}") from None
        raise
    return [encoding.ids for encoding in encodings]
