"""An instance that runs in the foreground: this process supervises, shows all logs, and ends with the services.

For systemd, containers, and whoever wants to watch: SIGTERM, SIGINT and SIGHUP drain and stop everything, a second one
ends it at once, and a service that is given up ends the others, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Mapping

from scalellm.launcher.down import bring_down
from scalellm.launcher.errors import LauncherError
from scalellm.launcher.instance import SUPERVISOR, Instance
from scalellm.launcher.notify import notify
from scalellm.launcher.plan import UpOptions
from scalellm.launcher.service_logs import LogFollower, shown_line
from scalellm.launcher.supervision import Supervisor
from scalellm.services.common.logs import LogFormat, log_formatter

_log = logging.getLogger(SUPERVISOR)

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOG_INTERVAL = 0.2


def run_in_foreground(
    instance: Instance,
    options: UpOptions,
    write: Callable[[str], None],
    environment: Mapping[str, str],
    log_format: LogFormat = "text",
) -> int:
    """Bring an instance up, keep it up, and bring it down again when told to end.

    Args:
        instance: The instance.
        options: Options of `up`.
        write: Takes each line of the logs.
        environment: Environment of this process: where systemd is told that all is healthy.
        log_format: text: each line behind its service's name. json: each line an object.

    Returns 0, or the number of the signal that came while it started. Raises LauncherError when something does not
    start, or is given up; the services are down then as well.
    """
    return asyncio.run(_Foreground(instance, options, write, environment, log_format).run())


class _Report:
    """Stages of the start are lines of the supervisor's log."""

    def __init__(self) -> None:
        self._stage = ""

    def begin(self, stage: str, detail: str) -> None:
        self._stage = stage
        _log.info("%s: %s", stage, detail)

    def waiting(self, detail: str) -> None:
        pass

    def done(self, detail: str) -> None:
        _log.info("%s: ready (%s)", self._stage, detail)


class _Foreground:
    def __init__(
        self,
        instance: Instance,
        options: UpOptions,
        write: Callable[[str], None],
        environment: Mapping[str, str],
        log_format: LogFormat,
    ) -> None:
        self._instance = instance
        self._write = write
        self._environment = environment
        self._log_format: LogFormat = log_format
        self._supervisor = Supervisor(instance, options, _Report(), in_foreground=True)
        self._stop = asyncio.Event()
        self._signal = 0
        self._killing: asyncio.Task[None] | None = None
        self._followers: dict[str, LogFollower] = {}

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGUSR1, self._supervisor.stand_down)
        # Opened with its first line, when the instance's folder is there.
        handler = logging.FileHandler(self._instance.log_file(SUPERVISOR), delay=True)
        handler.setFormatter(log_formatter(SUPERVISOR, self._log_format))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False
        self._follow(from_start=False)  # logs that an earlier instance has left
        showing = asyncio.create_task(self._show_logs())
        try:
            return await self._run()
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            self._show_new_lines()
            _log.removeHandler(handler)
            handler.close()

    async def _run(self) -> int:
        if not await self._supervisor.bring_up(self._stop):
            return self._signal
        state = self._supervisor.state
        _log.info("serving %s at %s", state.model, state.public_address)
        notify(self._environment, "READY=1", f"STATUS=serving {state.model} at {state.public_address}")
        given_up = await self._supervisor.keep()
        notify(self._environment, "STOPPING=1", f"STATUS={given_up or 'draining'}")
        if given_up or self._signal:
            with contextlib.suppress(LauncherError):  # `scalellm down` does it
                await asyncio.to_thread(bring_down, self._instance, self._on_stopping)
        await self._supervisor.wait_ended()
        if given_up:
            raise LauncherError(given_up)
        return 0

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signal and self._killing is None:
            self._killing = asyncio.create_task(self._supervisor.kill())
        self._signal = number
        self._stop.set()
        self._supervisor.stand_down()

    def _on_stopping(self, name: str) -> None:
        _log.info("stopping %s", name)

    async def _show_logs(self) -> None:
        while True:
            self._show_new_lines()
            await asyncio.sleep(_LOG_INTERVAL)

    def _show_new_lines(self) -> None:
        self._follow(from_start=True)
        for name, follower in self._followers.items():
            for line in follower.read():
                try:
                    self._write(shown_line(name, line, as_json=self._log_format == "json"))
                except OSError:  # nobody reads any more: the services go on, and the logs are in their files
                    self._write = _ignore

    def _follow(self, *, from_start: bool) -> None:
        for log in sorted(self._instance.logs.glob("*.log")):
            if log.stem not in self._followers:
                self._followers[log.stem] = LogFollower(log, from_start=from_start)


def _ignore(line: str) -> None:
    pass
