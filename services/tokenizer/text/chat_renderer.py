"""Renders chat templates in a child process, so that limits on time and memory can be enforced.

A sandboxed template can still loop for hours or double a string until memory is gone, and neither a thread nor a
signal handler stops that reliably. A process can be killed. The child is started once and kept; a render costs one
round trip over a pipe. Data crosses as JSON, so the template sees plain values only.
"""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from scalellm.services.common.child_environment import child_environment
from scalellm.services.common.child_process import ChildProcess, python_module
from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.text.chat_template_error import ChatTemplateError
from scalellm.services.tokenizer.text.turns import Job, Turns

_START_SECONDS = 120.0
_STALL_SECONDS = 30.0
"""Most seconds to wait for one render, if the machine is busy or the child was stopped."""
_RETRY_SECONDS = 1.0

# JSON in ASCII takes at most so many bytes for a character: two escapes for one beyond the first plane.
_BYTES_PER_CHAR = 12
_MAX_ERROR_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Limits on one render: seconds of CPU time, characters of output, bytes of the child's address space."""

    time_limit: float = 2.0
    max_chars: int = 4 << 20
    memory_bytes: int = 1 << 30


@dataclass(slots=True, eq=False, kw_only=True)
class _Render(Job):
    request: Mapping[str, Any]


class ChatRenderer:
    """One model's chat template in a process of its own. Use as an async context manager.

    Renders run one after the other, and callers take turns. A caller that leaves before its turn costs nothing, and one
    that leaves later does not disturb the others. If a render exceeds a limit, the child is restarted with the next
    render. If the child ends for another reason, the render is tried once more.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], limits: RenderLimits | None = None) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._limits = limits or RenderLimits()
        self._child: ChildProcess | None = None
        self._renders: Turns[_Render] = Turns()
        self._worker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start the child. Raises ChatTemplateError when the template is not valid, or the child does not start."""
        try:
            await self._running_child()
        except StatusError as error:
            raise ChatTemplateError(error.message) from None
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._worker is not None
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        self._renders.cancel_all()
        await self._kill()

    @property
    def is_working(self) -> bool:
        """True while chats can be rendered; false once that has failed for good."""
        return self._worker is not None and not self._worker.done()

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        caller: str = "",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return the text that the model reads.

        Args:
            messages: With `role` and `content` each.
            caller: Name of the tenant whose turn it takes.
            add_generation_prompt: See ChatTemplate.render, as for the rest.
            continue_final_message: See there.
            tools: See there.
            documents: See there.
            kwargs: See there.

        Raises:
            ChatTemplateError: The template refuses the messages, or exceeds a limit.
            StatusError: UNAVAILABLE if the child does not start, or does not answer in time.
        """
        request = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "documents": documents,
            "kwargs": dict(kwargs),
        }
        render = _Render(caller=caller, request=request)
        text: str = await self._renders.finish(render)
        return text

    async def _work(self) -> None:
        while True:
            render = await self._renders.take()
            try:
                text = await self._render(render.request)
            except asyncio.CancelledError:
                render.result.cancel()
                raise
            except Exception as error:
                if not render.result.done():  # the caller still waits
                    render.result.set_exception(error)
            else:
                if not render.result.done():
                    render.result.set_result(text)

    async def _render(self, request: Mapping[str, Any]) -> str:
        answer = await self._answer(request) or await self._answer(request)
        if answer is None:
            raise ChatTemplateError("the chat template brought its process down twice: out of memory")
        if "error" in answer:
            raise ChatTemplateError(answer["error"])
        text: str = answer["text"]
        return text

    async def _answer(self, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the child's answer; None if it ended for another reason than the time limit, or its answer was too
        long.
        """
        child = await self._running_child()
        try:
            async with asyncio.timeout(_STALL_SECONDS):
                answer = await child.ask(request)
        except TimeoutError:
            await self._kill()
            message = f"the process that renders chat templates did not answer for {_STALL_SECONDS:g} s"
            raise StatusError.unavailable(message, _RETRY_SECONDS) from None
        if answer is None:
            await self._kill()
            if await child.wait() == -signal.SIGPROF:
                limit = f"{self._limits.time_limit:g} s of CPU time"
                raise ChatTemplateError(f"the chat template takes longer than the limit of {limit}")
        return answer

    async def _running_child(self) -> ChildProcess:
        if self._child is not None and self._child.is_running:
            return self._child
        self._child = await ChildProcess.start(
            python_module("scalellm.services.tokenizer.text.chat_render_process"),
            child_environment(os.environ),
            max_answer=self._limits.max_chars * _BYTES_PER_CHAR + _MAX_ERROR_BYTES,
        )
        setup = {
            "source": self._source,
            "special_tokens": self._special_tokens,
            "time_limit": self._limits.time_limit,
            "max_chars": self._limits.max_chars,
            "memory_bytes": self._limits.memory_bytes,
        }
        answer = None
        try:
            async with asyncio.timeout(_START_SECONDS):
                answer = await self._child.ask(setup)
        except TimeoutError:
            pass
        if answer is None:
            await self._kill()
            raise StatusError.unavailable("the process that renders chat templates does not start", _RETRY_SECONDS)
        if "error" in answer:
            await self._kill()
            raise ChatTemplateError(answer["error"])
        return self._child

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.kill()
