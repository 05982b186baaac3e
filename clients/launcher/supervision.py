"""Keeps the services of an instance running: starts them, and starts again what ends on its own.

One supervisor at a time does that, the process that `state.supervisor` names; what it does to the state of an instance
that it brings up happens under the instance's lock. It ends no service: `bring_down` does. SIGUSR1 asks it to stand
down, and once it has taken its name out of the state it starts nothing any more. Should it die, the services go on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

from scalellm.launcher.errors import LauncherError
from scalellm.launcher.instance import SUPERVISOR, Instance, ServiceRecord, State
from scalellm.launcher.launch import Launch, Report, explain_end
from scalellm.launcher.plan import UpOptions
from scalellm.launcher.processes import find, record_of, terminate
from scalellm.launcher.redis_server import remove_scratch, shown
from scalellm.services.common.child_process import Restarts, describe_exit
from scalellm.services.common.log_file import log_files

_log = logging.getLogger("supervisor")

_CRASH_WINDOW = 600.0

# A supervisor that is asked to stand down may be starting something, or waiting for what a dead service left behind.
_STAND_DOWN_LIMIT = 10.0
_POLL = 0.02
_CANCEL_AGAIN = 0.5


class Supervisor:
    """Brings an instance up and keeps it up.

    Args:
        instance: The instance.
        options: Options of `up`.
        report: Told of the stages of the start.
        in_foreground: True if this process ends with the services.
    """

    def __init__(self, instance: Instance, options: UpOptions, report: Report, *, in_foreground: bool = False) -> None:
        self._instance = instance
        self._options = options
        self._report = report
        self._in_foreground = in_foreground
        self._stop = asyncio.Event()
        self._gave_up = asyncio.Event()
        self._launch: Launch

    @property
    def state(self) -> State:
        """The instance's, once `bring_up` has begun."""
        return self._launch.state

    async def bring_up(self, stop: asyncio.Event) -> bool:
        """Start everything, or what is missing. True once all of it is healthy; False when `stop` is set before.

        Raises LauncherError when the instance is running already, or when something does not start. Then, as when it is
        stopped, nothing of it is left but the logs; what was running before goes on and can be kept running.
        """
        starting = asyncio.create_task(self._bring_up())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if stop.is_set():
            while not starting.done():
                starting.cancel()
                await asyncio.wait({starting}, timeout=_CANCEL_AGAIN)
            if not starting.cancelled() and starting.exception() is None:  # a library took the cancellation for its own
                self._launch.undo()
            return False
        starting.result()
        return True

    async def _bring_up(self) -> None:
        with self._instance.locked():
            found = check_not_running(self._instance)
            if found is None:
                _clear_crashed(self._instance)
                for log in log_files(self._instance.log_file(SUPERVISOR)):
                    log.unlink(missing_ok=True)
            else:
                _check_same(found, self._options)
                stand_down(self._instance)
                found = self._instance.load()
            self._launch = Launch(self._instance, self._options, self._report, found)
            self._register()
            try:
                await self._launch.start_all()
            except LauncherError as error:
                self._launch.undo()
                if found is not None:
                    self._give_up_missing(str(error))
                raise
            except BaseException:
                self._launch.undo()
                raise

    @property
    def has_services(self) -> bool:
        """True if anything is there to be kept running."""
        return any(process.is_running for process in self._launch.processes.values())

    async def keep(self) -> str:
        """Keep the services running until told to stand down; in the foreground, until one is given up, too.

        Returns why a service was given up, if that is how it ended.
        """
        keeping = [
            asyncio.create_task(self._keep(name))
            for name in self._launch.processes
            if not self.state.service(name).given_up
        ]
        stopping = asyncio.create_task(self._stop.wait())
        giving_up = asyncio.create_task(self._gave_up.wait())
        try:
            await asyncio.wait({stopping, giving_up}, return_when=asyncio.FIRST_COMPLETED)
            self._stop.set()
            await asyncio.gather(*keeping)
        finally:
            for task in (stopping, giving_up, *keeping):
                task.cancel()
        self._launch.set_state(replace(self.state, supervisor=None))
        given_up = [service for service in self.state.services if service.given_up]
        return f"{given_up[0].name} is given up: {given_up[0].given_up}" if given_up else ""

    def stand_down(self) -> None:
        """Start nothing any more."""
        self._stop.set()

    async def wait_ended(self) -> None:
        """Return once all services have ended."""
        await asyncio.gather(*(process.wait() for process in self._launch.processes.values()))

    async def kill(self) -> None:
        """End all services at once."""
        await asyncio.to_thread(terminate, self.state.services, 0)

    def _register(self) -> None:
        record = record_of(os.getpid(), SUPERVISOR, SUPERVISOR, self._instance.log_file(SUPERVISOR))
        self._launch.state = replace(self.state, supervisor=record, in_foreground=self._in_foreground)
        for service in self.state.services:
            self._launch.change(service.name, given_up="")

    def _give_up_missing(self, reason: str) -> None:
        for service in self.state.services:
            if not find(service):
                self._launch.change(service.name, given_up=reason)

    async def _keep(self, name: str) -> None:
        """Keep one service running."""
        restarts = Restarts(self._options.max_restarts, window=_CRASH_WINDOW)
        while True:
            process = self._launch.processes[name]
            ended = asyncio.create_task(process.wait())
            if await self._stopped_before(ended):
                return
            code = ended.result()
            service = self.state.service(name)
            reason = describe_exit(code) if code is not None else "nobody saw how, another supervisor had started it"
            self._launch.change(name, ended_at=time.time(), reason=reason)
            # Children that a service leaves behind hold its port, or memory that it needs.
            await asyncio.to_thread(terminate, [service], 0)
            delay = restarts.crashed()
            if delay is None:
                times = "once" if restarts.num_crashes == 1 else f"{restarts.num_crashes} times"
                self._give_up(
                    name,
                    f"it ended {times} within {_CRASH_WINDOW / 60:.0f} minutes; the last time, "
                    f"{explain_end(service, code)}",
                )
                return
            _log.error("%s; starting it again in %.1f s", explain_end(service, code), delay)
            if await self._stopped_before(asyncio.create_task(asyncio.sleep(delay))):
                return
            try:
                await self._launch.start_again(name)
            except LauncherError as error:
                self._give_up(name, str(error))
                return
            _log.info("%s is started again, as process %d", name, self.state.service(name).pid)

    async def _stopped_before(self, waiting: asyncio.Task[object]) -> bool:
        """Wait for a task, unless told to stand down first."""
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({stopping, waiting}, return_when=asyncio.FIRST_COMPLETED)
            return self._stop.is_set()
        finally:
            for task in (stopping, waiting):
                task.cancel()

    def _give_up(self, name: str, reason: str) -> None:
        _log.critical("%s is not started again: %s", name, reason)
        self._launch.change(name, given_up=reason)
        if self._in_foreground:
            self._gave_up.set()


def supervisor_of(state: State) -> ServiceRecord | None:
    """The supervisor of an instance, if it is alive."""
    return state.supervisor if state.supervisor is not None and find(state.supervisor) else None


def check_not_running(instance: Instance) -> State | None:
    """Raise LauncherError when the instance runs and needs no help. Returns its state when part of it runs."""
    state = instance.load()
    if state is None:
        return None
    missing = [service.name for service in state.services if not find(service)]
    supervisor = supervisor_of(state)
    if len(missing) == len(state.services) and supervisor is None:
        return None
    if supervisor is None or (any(service.given_up for service in state.services) and not state.in_foreground):
        return state
    if not state.public_address:
        raise LauncherError(f"another scalellm up is starting instance {instance.name!r}; wait for it to end")
    running = f"already running at {state.public_address} (model {state.model})"
    if missing:
        running += f", and {', '.join(missing)} is being started again (see: scalellm status)"
    raise LauncherError(f"{running}; stop it first with: scalellm down")


def running_state(instance: Instance) -> State | None:
    """The state of an instance all of whose services run; None when none does. Raises LauncherError in between."""
    state = instance.load()
    if state is None:
        return None
    missing = [service.name for service in state.services if not find(service)]
    if len(missing) == len(state.services):
        return None
    if missing or not state.public_address:
        running = [service.name for service in state.services if service.name not in missing]
        raise LauncherError(
            f"partly running: {', '.join(running)}; not running: {', '.join(missing) or 'the rest'}; "
            "see scalellm status; start what is missing with: scalellm up"
        )
    return state


def stand_down(instance: Instance, limit: float = _STAND_DOWN_LIMIT) -> bool:
    """Make an instance's supervisor leave the services alone. Whether there was one to ask. Hold the instance's lock.

    One that does not within `limit` seconds is killed.
    """
    state = instance.load()
    supervisor = supervisor_of(state) if state is not None else None
    if supervisor is None:
        return False

    def is_standing() -> bool:
        now = instance.load()
        return find(supervisor) is not None and now is not None and now.supervisor is not None

    _signal(supervisor, signal.SIGUSR1)
    if not _comes_true(lambda: not is_standing(), limit):
        _signal(supervisor, signal.SIGKILL)
        _comes_true(lambda: not is_standing(), limit)
    return True


def _signal(record: ServiceRecord, number: signal.Signals) -> None:
    if (process := find(record)) is not None:
        process.send_signal(number)


def _comes_true(condition: Callable[[], bool], limit: float) -> bool:
    deadline = time.monotonic() + limit
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL)
    return held


def _check_same(state: State, options: UpOptions) -> None:
    """Raise LauncherError unless the instance was brought up by the same options."""
    asked = options.asked
    differing = [
        f"{name} {_told(state.asked[name])}, not {_told(asked[name])}"
        for name in sorted(asked.keys() & state.asked.keys())
        if asked[name] != state.asked[name]
    ]
    if differing:
        raise LauncherError(
            f"partly running, with other options ({'; '.join(differing)}): "
            "give the same ones to start what is missing, or stop it first with: scalellm down"
        )


def _told(value: object) -> str:
    """A value of an option, without a password that a URL may hold."""
    return shown(value) if isinstance(value, str) and "://" in value else repr(value)


def _clear_crashed(instance: Instance) -> None:
    """Remove what an instance has left whose services have all crashed, but for the conversations."""
    state = instance.load()
    if state is not None:
        terminate(state.services, 0)
        remove_scratch(state.scratch)
        instance.remove(keep_logs=True, keep_data=True)
