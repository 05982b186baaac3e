"""The encoder: the same ids as one by one, for any mix of callers, some of whom go away."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from scalellm.services.tokenizer.text.encoder import (
    BATCH_CHARS,
    INLINE_CHARS,
    EncodeBatcher,
    TokenizerPanicError,
    TooManyTokensError,
)
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer


def some_text(rng: random.Random, length: int) -> str:
    words = ["hello", "wörld", "数据", "12345", "<|im_start|>", "\n\n", "  ", "😀", "don't"]
    text = ""
    while len(text) < length:
        text += rng.choice(words) + " "
    return text[:length]


async def test_concurrent_callers_get_what_encoding_alone_gives(gemma3: ModelTokenizer) -> None:
    rng = random.Random(1)
    lengths = [0, 1, INLINE_CHARS, INLINE_CHARS + 1, BATCH_CHARS + 1] + [rng.randrange(5000) for _ in range(60)]
    texts = [some_text(rng, length) for length in lengths]
    flags = [rng.random() < 0.5 for _ in texts]
    async with EncodeBatcher(gemma3.tokenizer) as encoder:
        tasks = [
            asyncio.create_task(encoder.encode(text, add_special_tokens=flag))
            for text, flag in zip(texts, flags, strict=True)
        ]
        gone = rng.sample(range(len(tasks)), 20)
        await asyncio.sleep(0)
        for index in gone:
            tasks[index].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for index, (text, flag, result) in enumerate(zip(texts, flags, results, strict=True)):
        if index in gone and isinstance(result, asyncio.CancelledError):
            continue
        assert result == gemma3.tokenizer.encode(text, add_special_tokens=flag).ids


async def test_closing_cancels_what_waits(smollm2: ModelTokenizer) -> None:
    async with EncodeBatcher(smollm2.tokenizer) as encoder:
        tasks = [asyncio.create_task(encoder.encode("x " * INLINE_CHARS)) for _ in range(3)]
        await asyncio.sleep(0)
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_the_event_loop_goes_on_while_a_long_text_is_encoded(smollm2: ModelTokenizer) -> None:
    async with EncodeBatcher(smollm2.tokenizer) as encoder:
        task = asyncio.create_task(encoder.encode("some words " * 20_000))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 10
        assert len(await task) == len(smollm2.tokenizer.encode("some words " * 20_000).ids)


async def test_other_work_takes_turns_too(smollm2: ModelTokenizer) -> None:
    async with EncodeBatcher(smollm2.tokenizer) as encoder:
        assert await encoder.run("somebody", lambda: 6 * 7) == 42
        with pytest.raises(ZeroDivisionError):
            await encoder.run("somebody", lambda: 1 // 0)
        assert encoder.is_working


async def test_a_real_panic(smollm2: ModelTokenizer) -> None:
    panicking = Tokenizer.from_str(smollm2.tokenizer.to_str())
    panicking.post_processor = processors.TemplateProcessing("$A $B:1 $B")
    async with EncodeBatcher(panicking) as encoder:
        for text in ("x", "x " * INLINE_CHARS):
            with pytest.raises(TokenizerPanicError):
                await encoder.encode(text)
        assert (encoder.num_panics, encoder.is_working) == (2, True)


class WatchedTokenizer:
    """A real tokenizer that keeps the first letter of all it encodes, and panics over some texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.encoded: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> Any:
        if any("panic" in text for text in texts):
            raise type("PanicException", (BaseException,), {})("index out of bounds")
        self.encoded += [text[0] for text in texts]
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


async def test_callers_take_turns(smollm2: ModelTokenizer) -> None:
    watched = WatchedTokenizer(smollm2.tokenizer)
    async with EncodeBatcher(watched) as encoder:
        hungry = [asyncio.create_task(encoder.encode("h" + "12" * BATCH_CHARS, caller="hungry")) for _ in range(6)]
        await asyncio.sleep(0)
        quiet = [asyncio.create_task(encoder.encode(name * BATCH_CHARS, caller=name)) for name in "qr"]
        await asyncio.gather(*quiet)
        # One of the hungry caller's had begun; one more has its turn before the others'.
        assert watched.encoded[:4].count("h") <= 2
        assert set(watched.encoded[:4]) == {"h", "q", "r"}
        await asyncio.gather(*hungry)


async def test_callers_that_have_gone_cost_nothing(smollm2: ModelTokenizer) -> None:
    watched = WatchedTokenizer(smollm2.tokenizer)
    async with EncodeBatcher(watched) as encoder:
        tasks = [asyncio.create_task(encoder.encode("g" + "12" * BATCH_CHARS, caller="gone")) for _ in range(6)]
        await asyncio.sleep(0)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks[1:])
        assert not encoder._jobs._queues  # their texts are not kept either
        await encoder.encode("q" * BATCH_CHARS, caller="quiet")
        await asyncio.wait(tasks)
    assert watched.encoded == ["g", "q"]


async def test_a_text_that_is_certainly_too_long_is_not_encoded(smollm2: ModelTokenizer) -> None:
    watched = WatchedTokenizer(smollm2.tokenizer)
    digits = "0123456789" * 10_000
    async with EncodeBatcher(watched) as encoder:
        refused, fitting = await asyncio.gather(
            encoder.encode(digits, max_tokens=8000),
            encoder.encode("1" * 8000, max_tokens=8000),
            return_exceptions=True,
        )
    assert isinstance(refused, TooManyTokensError)
    assert 99_000 < refused.at_least <= 100_000
    assert fitting == smollm2.tokenizer.encode("1" * 8000).ids
    assert watched.encoded == ["1"]


async def test_a_panic_ends_one_text_and_not_the_encoder(smollm2: ModelTokenizer) -> None:
    watched = WatchedTokenizer(smollm2.tokenizer)
    long = "panic " * INLINE_CHARS
    async with EncodeBatcher(watched) as encoder:
        texts = [long, "x " * INLINE_CHARS, "panic", "y"]
        tasks = [asyncio.create_task(encoder.encode(text)) for text in texts]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, TokenizerPanicError) for result in results] == [True, False, True, False]
        assert results[1] == smollm2.tokenizer.encode(texts[1]).ids
        assert encoder.num_panics == 2
        assert encoder.is_working
        assert await encoder.encode(texts[1]) == results[1]
    assert not encoder.is_working
