"""The encoder: the same ids as one by one, for any mix of callers, some of whom go away."""

import asyncio
import random

import pytest

from services.tokenizer.text.encoder import BATCH_CHARS, INLINE_CHARS, EncodeBatcher
from services.tokenizer.text.model_tokenizer import ModelTokenizer


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
