"""Brings an instance up: Redis, executors, scheduler and tokenizer, side by side, and waits until all are healthy.

A service is told where the next one down the line listens, which that one says long before it is ready: loading a model
takes seconds, during which the others start.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from clients.launcher.credentials import make_link_token, service_credentials, with_link_token
from clients.launcher.errors import LauncherError
from clients.launcher.health import Probe
from clients.launcher.instance import EXECUTOR, REDIS, SCHEDULER, TOKENIZER, Instance, ServiceRecord, State
from clients.launcher.plan import UpOptions, check_ports, listeners, service_command, service_environment
from clients.launcher.processes import find, last_error, last_lines, last_message, spawn, terminate
from clients.launcher.redis_server import (
    check_redis,
    choose_socket,
    find_redis_server,
    redis_command,
    remove_scratch,
    shown,
)
from services.common.addresses import local_address
from services.common.child_environment import child_environment
from services.common.health_check import SERVING

_POLL = 0.05
_REDIS_START_LIMIT = 60.0

# A start that failed has served nobody: nothing to drain.
_UNDO_LIMIT = 5.0


class Report(Protocol):
    """Where `up` says how far it is."""

    def begin(self, stage: str, detail: str) -> None:
        """A stage begins: what is being done."""

    def waiting(self, detail: str) -> None:
        """Called several times a second while the stage lasts."""

    def done(self, detail: str) -> None:
        """The stage is done: the outcome."""


def bring_up(instance: Instance, options: UpOptions, report: Report) -> State:
    """Start everything and return once all of it is healthy.

    Raises LauncherError when the instance is running already, or when something does not start; then, as on any other
    exception, nothing of it is left but the logs.
    """
    with instance.locked():
        check_not_running(instance)
        _clear_crashed(instance)
        launch = _Launch(instance, options, report)
        try:
            launch.start_all()
        except BaseException:
            launch.undo()
            raise
        return launch.state


def running_state(instance: Instance) -> State | None:
    """The state of an instance all of whose services run; None when none does. Raises LauncherError in between."""
    state = instance.load()
    if state is None:
        return None
    running = [service.name for service in state.services if find(service)]
    if not running:
        return None
    if len(running) < len(state.services) or not state.of_kind(TOKENIZER):
        crashed = [service.name for service in state.services if service.name not in running]
        raise LauncherError(
            f"partly running: {', '.join(running)}; not running: {', '.join(crashed) or 'the rest'}; "
            "clear it with: scalellm down"
        )
    return state


def check_not_running(instance: Instance) -> None:
    """Raise LauncherError when any service of the instance runs."""
    state = running_state(instance)
    if state is not None:
        raise LauncherError(
            f"already running at {state.public_address} (model {state.model}); stop it first with: scalellm down"
        )


def _clear_crashed(instance: Instance) -> None:
    """Remove what an instance has left whose services have all crashed."""
    state = instance.load()
    if state is not None:
        terminate(state.services, 0)
        remove_scratch(state.scratch)
        instance.remove(keep_logs=True)


class _Launch:
    """One attempt to bring an instance up."""

    def __init__(self, instance: Instance, options: UpOptions, report: Report) -> None:
        self._instance = instance
        self._options = options
        self._plan = listeners(options)
        self._report = report
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._spawned_at: dict[str, float] = {}
        self.state = State(model=options.model, redis_url=options.redis_url, drain_limit=options.drain_limit)

    def start_all(self) -> None:
        """Start everything, what takes longest first."""
        for kind in (EXECUTOR, SCHEDULER, TOKENIZER):  # what is missing is said before anything is started
            service_credentials(kind, self._options.environment)
        check_ports(self._plan)
        if self._options.redis_url:
            self._check_redis()
        make_link_token(self._instance, self._options.environment)
        environment = with_link_token(self._instance, self._options.environment)
        self._options = replace(self._options, environment=environment)
        executors = [name for name in self._plan if name.startswith(EXECUTOR)]
        for name in executors:
            self._spawn_service(name, EXECUTOR, "")
        if not self._options.redis_url:
            self._start_redis()
        what = (
            "running fake engine" if self._options.engine == "fake" else f"loading the weights of {self._options.model}"
        )
        self._report.begin(executors[0], what)
        for name in executors:
            self._await_address(name)
        addresses = ",".join(service.address for service in self.state.of_kind(EXECUTOR))
        self._spawn_service(SCHEDULER, SCHEDULER, addresses)
        self._await_address(SCHEDULER)
        self._spawn_service(TOKENIZER, TOKENIZER, self._service(SCHEDULER).address)
        for name in executors:
            if name != executors[0]:
                self._report.begin(name, what)
            self._await_healthy(name)
        self._report.begin(SCHEDULER, "connecting to the executors")
        self._await_healthy(SCHEDULER)
        self._report.begin(TOKENIZER, "loading the vocabulary")
        self._await_address(TOKENIZER)
        self._await_healthy(TOKENIZER)

    def undo(self) -> None:
        """End what was started; the logs stay."""
        terminate(self.state.services, _UNDO_LIMIT)
        remove_scratch(self.state.scratch)
        self._instance.remove(keep_logs=True)

    def _check_redis(self) -> None:
        where = shown(self._options.redis_url)
        self._report.begin(REDIS, f"asking {where}")
        health = check_redis(self._options.redis_url)
        if health.error:
            raise LauncherError(
                f"REDIS_URL: {where} cannot be used: {health.error}; correct REDIS_URL, "
                "or unset it to use an embedded one"
            )
        self._report.done(f"{where}, version {health.version or 'unknown'}")

    def _start_redis(self) -> None:
        self._report.begin(REDIS, "starting the embedded server")
        executable = find_redis_server()
        socket, scratch = choose_socket(self._instance.folder)
        url = f"unix://{socket}"
        self._set(replace(self.state, redis_url=url, scratch=scratch))
        self._spawn(
            REDIS,
            REDIS,
            redis_command(executable, socket, self._instance.folder),
            child_environment(self._options.environment),
        )
        self._set(self.state.with_service(replace(self._service(REDIS), address=str(socket))))
        self._wait(REDIS, lambda: socket.exists() and not check_redis(url).error, _REDIS_START_LIMIT)
        self._report.done(f"embedded, version {check_redis(url).version}, {self._age(REDIS)}")

    def _spawn_service(self, name: str, kind: str, upstream: str) -> None:
        announce = self._instance.announce_file(name)
        command = service_command(self._options, name, kind, self._plan[name], announce, upstream)
        self._spawn(name, kind, command, service_environment(self._options, kind, self.state.redis_url))

    def _await_address(self, name: str) -> None:
        """Return once the service listens."""
        announce = self._instance.announce_file(name)
        self._wait(name, announce.exists, self._options.start_limit)
        record = _with_announced(self._service(name), self._instance.read_announced(name))
        self._set(self.state.with_service(record))

    def _await_healthy(self, name: str) -> None:
        """Return once the service is ready to work."""
        address = self._service(name).address
        credentials = service_credentials(self._service(name).kind, self._options.environment)
        with Probe(address, credentials) as probe:
            self._wait(name, lambda: probe.health() == SERVING, self._options.start_limit)
        self._report.done(f"{address}, {self._age(name)}")

    def _wait(self, name: str, is_ready: Callable[[], bool], limit: float) -> None:
        """Return once ready; LauncherError when anything ends meanwhile, or `limit` seconds after it was spawned."""
        while not is_ready():
            for other, process in self._processes.items():
                if (status := process.poll()) is not None:
                    raise LauncherError(_explain_end(self._service(other), status))
            if time.monotonic() - self._spawned_at[name] > limit:
                log = self._service(name).log
                raise LauncherError(f"{name} is not healthy after {limit:.0f} s; its log: {log}{_quoted(log)}")
            said = last_message(self._service(name).log)
            self._report.waiting(f"{self._age(name)}, {said}" if said else self._age(name))
            time.sleep(_POLL)

    def _spawn(self, name: str, kind: str, command: Sequence[str], environment: dict[str, str]) -> None:
        log = self._instance.log_file(name)
        with _uninterrupted():  # or nobody would know of the process, and end it
            record, process = spawn(name, kind, command, log, environment)
            self._processes[name] = process
            self._spawned_at[name] = time.monotonic()
            self._set(self.state.with_service(record))

    def _age(self, name: str) -> str:
        return f"{time.monotonic() - self._spawned_at[name]:.1f} s"

    def _service(self, name: str) -> ServiceRecord:
        return next(service for service in self.state.services if service.name == name)

    def _set(self, state: State) -> None:
        self.state = state
        self._instance.save(state)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Take SIGINT and SIGTERM only afterwards. They are not blocked: what is started meanwhile would inherit that."""
    if threading.current_thread() is not threading.main_thread():  # which is the one that signals interrupt
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, frame: held.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        for caught in held:
            signal.raise_signal(caught)


def _with_announced(record: ServiceRecord, lines: Sequence[str]) -> ServiceRecord:
    """The record with the service's addresses, as seen from this machine."""
    named = dict(line.split("=", 1) for line in lines[1:] if "=" in line)
    http = named.get("http", "")
    return replace(
        record,
        address=local_address(lines[0]),
        metrics_address=named.get("metrics", ""),
        http_address=local_address(http) if http else "",
    )


def _explain_end(service: ServiceRecord, status: int) -> str:
    how = f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
    if status == -signal.SIGKILL:
        how += " (out of memory?)"
    if error := last_error(service.log):
        return f"{service.name} {how}: {error} (log: {service.log})"
    return f"{service.name} {how}; its log: {service.log}{_quoted(service.log)}"


def _quoted(log: str) -> str:
    return "".join(f"\n  {line}" for line in last_lines(log)[-5:])
