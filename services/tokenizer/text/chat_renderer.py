"""Renders chat templates in a child process, so that a limit on time or memory is a limit.

A sandboxed template can still loop for hours or double a string until memory is gone, and neither a thread nor a
signal handler stops that reliably. A process can be killed. The child is started once and kept; a render costs one
round trip over a pipe. Data crosses as JSON, so the template sees plain values only.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from services.tokenizer.text.chat_render_process import LENGTH
from services.tokenizer.text.chat_template import ChatTemplateError

_START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Limits on one render: seconds, characters of output, bytes of address space of the rendering process."""

    time_limit: float = 2.0
    max_chars: int = 4 << 20
    memory_bytes: int = 1 << 30


class ChatRenderer:
    """One model's chat template in a process of its own. Use as an async context manager.

    Renders run one after the other. A render that is cancelled does not disturb the others, and one that hits a limit
    costs a restart of the child, which the next render pays.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], limits: RenderLimits | None = None) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._limits = limits or RenderLimits()
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        self._renders: set[asyncio.Task[str]] = set()

    async def __aenter__(self) -> Self:
        """Start the child. Raises ChatTemplateError when the template is not valid."""
        async with self._lock:
            await self._running_child()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._renders:
            task.cancel()
        await asyncio.gather(*self._renders, return_exceptions=True)
        await self._kill()

    async def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Return the text that the model reads. Raises ChatTemplateError: refused by the template, or over a limit."""
        request = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        # A task of its own: a caller that goes away must not leave half an answer in the pipe for the next one.
        task = asyncio.create_task(self._render(request))
        self._renders.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[str]) -> None:
        self._renders.discard(task)
        if not task.cancelled():
            task.exception()  # seen: the caller may be gone

    async def _render(self, request: Mapping[str, Any]) -> str:
        async with self._lock:
            child = await self._running_child()
            try:
                async with asyncio.timeout(self._limits.time_limit):
                    answer = await _exchange(child, request)
            except TimeoutError:
                await self._kill()
                raise ChatTemplateError(
                    f"the chat template takes longer than the limit of {self._limits.time_limit:g} s"
                ) from None
            except (asyncio.IncompleteReadError, ConnectionError):
                await self._kill()
                raise ChatTemplateError("the chat template brought its process down: out of memory or time") from None
            except asyncio.CancelledError:
                await self._kill()
                raise
        if "error" in answer:
            raise ChatTemplateError(answer["error"])
        text: str = answer["text"]
        return text

    async def _running_child(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        pipe = asyncio.subprocess.PIPE
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.tokenizer.text.chat_render_process", stdin=pipe, stdout=pipe
        )
        setup = {
            "source": self._source,
            "special_tokens": self._special_tokens,
            "time_limit": self._limits.time_limit,
            "max_chars": self._limits.max_chars,
            "memory_bytes": self._limits.memory_bytes,
        }
        try:
            async with asyncio.timeout(_START_SECONDS):
                answer = await _exchange(self._child, setup)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            await self._kill()
            raise ChatTemplateError("the process that renders chat templates does not start") from error
        if "error" in answer:
            await self._kill()
            raise ChatTemplateError(answer["error"])
        return self._child

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            if child.returncode is None:
                child.kill()
            await child.wait()


async def _exchange(child: asyncio.subprocess.Process, request: Mapping[str, Any]) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    data = json.dumps(request).encode("ascii")
    child.stdin.write(LENGTH.pack(len(data)) + data)
    await child.stdin.drain()
    (length,) = LENGTH.unpack(await child.stdout.readexactly(LENGTH.size))
    answer: dict[str, Any] = json.loads(await child.stdout.readexactly(length))
    return answer
