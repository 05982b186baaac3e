"""Child processes: starting and ending them, messages to and from them, and the delays of restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scalellm.services.common.json_lines import Message, to_line

PIPE = subprocess.PIPE

_MAX_ANSWER = 64 * 2**10
_POLL = 0.1


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this Python interpreter."""
    return [sys.executable, "-m", module, *arguments]


def describe_exit(code: int) -> str:
    """Describe the end of a process, such as `signal SIGKILL` or `exit code 3`.

    Args:
        code: Its exit code, negative for a signal, as in `subprocess`.
    """
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"


class ChildProcess:
    """A child process. Made by `start`.

    asyncio's own class is not used, because it kills the process when its object is garbage-collected, while services
    that `scalellm up` starts must outlive it.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._ended = asyncio.Event()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        listens: bool = True,
        output: int | None = PIPE,
        errors: int | None = None,
        pass_fds: Sequence[int] = (),
        own_session: bool = False,
        max_answer: int = _MAX_ANSWER,
    ) -> ChildProcess:
        """Start a command. Raises OSError.

        Args:
            command: Program and arguments, without secrets, since every user of the machine can read them.
            environment: All variables of the process, from `child_environment`.
            listens: True if it gets messages on its standard input, which then ends when this process does.
            output: Descriptor for its standard output; PIPE: it writes answers there; None: this process's output.
            errors: The same for its standard error.
            pass_fds: Descriptors that it inherits.
            own_session: True to run it in a session of its own, so that a terminal's signals, such as that of Ctrl-C,
                do not reach it.
            max_answer: Bytes of the longest answer.
        """
        process = subprocess.Popen(  # noqa: ASYNC220 - for as long as the fork takes, as asyncio's own does
            command,
            bufsize=0,
            stdin=PIPE if listens else subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(environment),
            pass_fds=pass_fds,
            start_new_session=own_session,
        )
        child = cls(process)
        try:
            await child._attach(max_answer)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return child

    async def _attach(self, max_answer: int) -> None:
        loop = asyncio.get_running_loop()
        if self._process.stdin is not None:
            protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
            transport, _ = await loop.connect_write_pipe(lambda: protocol, self._process.stdin)
            self._writer = asyncio.StreamWriter(transport, protocol, None, loop)
        if self._process.stdout is not None:
            reader = asyncio.StreamReader(limit=max_answer)
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout)
            self._reader = reader
        self._watch = asyncio.create_task(self._watch_end())

    async def _watch_end(self) -> None:
        """Wait for the end of the process, reap it, and set `_ended`."""
        loop = asyncio.get_running_loop()
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:  # not on this kernel
            while self.is_running:  # noqa: ASYNC110 - nobody here sets an event
                await asyncio.sleep(_POLL)
        else:
            readable = asyncio.Event()
            loop.add_reader(descriptor, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
            self._process.poll()
        self._ended.set()
        if self._writer is not None:
            self._writer.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """False once it has ended."""
        return self._process.poll() is None

    def tell(self, message: Mapping[str, Any]) -> None:
        """Write a message to the process's standard input, without waiting until it is read."""
        assert self._writer is not None
        self._writer.write(to_line(message))

    async def ask(self, message: Mapping[str, Any]) -> Message | None:
        """Write a message and return the process's answer; None if it ends instead."""
        self.tell(message)
        assert self._writer is not None
        with contextlib.suppress(ConnectionError):  # it has ended, but may have written an answer before
            await self._writer.drain()
        return await self.answer()

    async def answer(self) -> Message | None:
        """Return the next message from the process's standard output; None if it ends, or writes something else."""
        assert self._reader is not None
        try:
            line = await self._reader.readline()
            if not line.endswith(b"\n"):
                return None
            message: Message = json.loads(line)
        except (ValueError, ConnectionError):  # longer than allowed, or not JSON
            return None
        return message

    async def wait(self) -> int:
        """Wait until the process has ended, and return its exit code, as for `describe_exit`."""
        await self._until_ended()
        return self._process.wait()

    def terminate(self) -> None:
        """Send SIGTERM to the process, without waiting for its end."""
        self._process.terminate()

    async def kill(self) -> None:
        """Send SIGKILL to the process if it still runs, and wait for its end."""
        self._process.kill()
        await self._until_ended()

    async def end(self, limit: float) -> bool:
        """Send SIGTERM to the process, and kill it after `limit` seconds. Returns whether it ended by itself."""
        self.terminate()
        # Not asyncio.timeout: in Python 3.11.2 (Debian 12) it never expires in a task that was cancelled before.
        end = asyncio.create_task(self._until_ended())
        try:
            await asyncio.wait([end], timeout=limit)
            if end.done():
                return True
        finally:
            end.cancel()
        await self.kill()
        return False

    async def _until_ended(self) -> None:
        assert self._watch is not None
        if self._watch.cancelling():  # with all tasks of the loop, as when SystemExit ends `asyncio.run`
            self._watch = asyncio.create_task(self._watch_end())
        await self._ended.wait()

    async def leave(self) -> None:
        """Stop watching the process, which goes on running and may outlive this one."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()


class Restarts:
    """Computes the delay before a crashed process is restarted, and decides when to give up.

    Args:
        most: Most crashes within the window that are followed by a restart.
        window: Seconds after which a crash is forgotten.
        first_delay: Seconds from the first crash in the window to the restart. Each further crash doubles them.
        longest_delay: Largest delay, in seconds.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        most: int,
        *,
        window: float = math.inf,
        first_delay: float = 0.1,
        longest_delay: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._window = window
        self._first_delay = first_delay
        self._longest_delay = longest_delay
        self._clock = clock
        self._crashes: deque[float] = deque()

    @property
    def num_crashes(self) -> int:
        """Number of crashes that are not forgotten."""
        return len(self._crashes)

    def crashed(self) -> float | None:
        """Record a crash. Returns the seconds to wait before the restart; None: give up."""
        now = self._clock()
        self._crashes.append(now)
        while self._crashes[0] < now - self._window:
            self._crashes.popleft()
        if len(self._crashes) > self._most:
            return None
        return min(self._longest_delay, self._first_delay * 2.0 ** min(len(self._crashes) - 1, 64))

    def forget(self) -> None:
        """Forget earlier crashes, because the process works."""
        self._crashes.clear()
