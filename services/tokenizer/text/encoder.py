"""Text to token ids without holding up the event loop."""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from tokenizers import Tokenizer

INLINE_CHARS = 1024
"""Texts up to this length are encoded on the event loop: about 0.3 us per character, while handing a text to the thread
and back costs 50-100 us and the thread takes the GIL for part of its work anyway."""

BATCH_CHARS = 1 << 16
"""Texts are batched up to this many characters, about 20 ms: a batch is answered as a whole."""


@dataclass(frozen=True, slots=True)
class _Job:
    text: str
    add_special_tokens: bool
    result: asyncio.Future[list[int]]


class EncodeBatcher:
    """Encodes the texts of concurrent callers in batches, in one thread. Use as an async context manager.

    While a batch is being encoded the next one gathers, so nobody waits for a batch to fill. The tokenizer is only
    read: no truncation or padding is ever switched. A caller that is cancelled before its batch starts costs nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._worker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._worker is not None
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        for job in self._jobs:
            job.result.cancel()
        self._thread.shutdown()

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; special tokens written in it are recognised.

        `add_special_tokens` puts the model's own tokens around it, usually one for the beginning: right for a plain
        prompt, wrong for a rendered chat template, which writes them itself.
        """
        if len(text) <= INLINE_CHARS:
            return _encode(self._tokenizer, [text], add_special_tokens)[0]
        job = _Job(text, add_special_tokens, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._arrived.set()
        return await job.result

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._take_batch()
            if not batch:
                self._arrived.clear()
                continue
            texts = [job.text for job in batch]
            try:
                ids = await loop.run_in_executor(
                    self._thread, _encode, self._tokenizer, texts, batch[0].add_special_tokens
                )
            except asyncio.CancelledError:
                for job in batch:
                    job.result.cancel()
                raise
            except Exception as error:
                for job in batch:
                    if not job.result.done():
                        job.result.set_exception(error)
                continue
            for job, token_ids in zip(batch, ids, strict=True):
                if not job.result.done():  # the caller may have gone
                    job.result.set_result(token_ids)

    def _take_batch(self) -> list[_Job]:
        """Take jobs in order of arrival, as long as they are of one kind and the batch stays small."""
        batch: list[_Job] = []
        chars = 0
        while self._jobs:
            job = self._jobs[0]
            if job.result.done():
                self._jobs.popleft()
                continue
            chars += len(job.text)
            if batch and (chars > BATCH_CHARS or job.add_special_tokens != batch[0].add_special_tokens):
                break
            batch.append(self._jobs.popleft())
        return batch


def _encode(tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    # The batch call also for one text: it skips the character offsets, about a fifth of the work.
    return [
        encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    ]
