"""The supervisor of an instance that runs in the background: `python -m scalellm.launcher.supervisor_process`.

`scalellm up` starts it, tells it on standard input what to start, and reads on standard output how far it is. Once all
is healthy it closes both and goes on alone; should `up` end before that, it undoes what it has begun and ends, too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from scalellm.launcher.errors import LauncherError
from scalellm.launcher.instance import SUPERVISOR, Instance
from scalellm.launcher.supervision import Supervisor
from scalellm.launcher.up import read_assignment
from scalellm.services.common.json_lines import read_line, write_line
from scalellm.services.common.log_file import BoundedLog
from scalellm.services.common.logs import LogFormat, log_handler

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class _Answers:
    """The report that `up` shows."""

    def begin(self, stage: str, detail: str) -> None:
        _say(event="begin", arguments=[stage, detail])

    def waiting(self, detail: str) -> None:
        _say(event="waiting", arguments=[detail])

    def done(self, detail: str) -> None:
        _say(event="done", arguments=[detail])


def _say(**message: object) -> None:
    write_line(sys.stdout.buffer, message)


async def _run() -> None:
    told = read_line(sys.stdin.buffer)
    if told is None:
        return
    instance, options = read_assignment(told)
    supervisor = Supervisor(instance, options, _Answers())
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    loop.add_reader(sys.stdin, stop.set)  # nothing more is said there: it ends with `up`
    try:
        if not await supervisor.bring_up(stop):
            return
        _say(up=True)
    except LauncherError as error:
        _say(error=str(error))
        if not supervisor.has_services:
            return
    loop.remove_reader(sys.stdin)
    _settle(instance, options.log_format)
    for number in _SIGNALS:
        loop.add_signal_handler(number, supervisor.stand_down)
    logging.getLogger(SUPERVISOR).info("keeping the services running")
    await supervisor.keep()


def _settle(instance: Instance, log_format: LogFormat) -> None:
    """Let go of the standard streams of `up`; what is logged from now on goes to the instance's logs."""
    log = instance.log_file(SUPERVISOR)
    nothing = os.open(os.devnull, os.O_RDWR)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    for stream, target in ((0, nothing), (1, output), (2, output)):
        os.dup2(target, stream)
    handler = log_handler(SUPERVISOR, log_format, sys.stderr)
    handler.addFilter(BoundedLog(log))
    logging.basicConfig(level="INFO", handlers=[handler])


if __name__ == "__main__":
    asyncio.run(_run())
