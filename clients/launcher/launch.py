"""Starts the services of an instance: Redis, executors, scheduler and tokenizer, side by side, until all are healthy.

A service is told where the next one down the line listens, which that one says long before it is ready: loading a model
takes seconds, during which the others start.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from scalellm.launcher.credentials import make_link_token, service_credentials, with_link_token
from scalellm.launcher.errors import LauncherError
from scalellm.launcher.health import Probe
from scalellm.launcher.instance import EXECUTOR, REDIS, SCHEDULER, TOKENIZER, Instance, ServiceRecord, State
from scalellm.launcher.plan import Listener, UpOptions, check_ports, listeners, service_command, service_environment
from scalellm.launcher.processes import FoundProcess, find, last_error, last_lines, last_message, spawn, terminate
from scalellm.launcher.redis_server import (
    ask_redis,
    choose_socket,
    find_redis_server,
    redis_command,
    remove_scratch,
    shown,
)
from scalellm.services.common.addresses import local_address, split_address
from scalellm.services.common.child_environment import child_environment
from scalellm.services.common.child_process import ChildProcess, describe_exit
from scalellm.services.common.health_check import SERVING

_POLL = 0.05
_REDIS_START_LIMIT = 60.0

# A start that failed has served nobody: nothing to drain.
_UNDO_LIMIT = 5.0


class Report(Protocol):
    """Listener to the progress of `up`."""

    def begin(self, stage: str, detail: str) -> None:
        """A stage begins: what is being done."""

    def waiting(self, detail: str) -> None:
        """Called several times a second while the stage lasts."""

    def done(self, detail: str) -> None:
        """The stage is done: the outcome."""


class Launch:
    """The services of an instance, as one supervisor starts them.

    Args:
        instance: The instance, whose folder keeps the state.
        options: Options of `up`.
        report: Told of the stages.
        found: The state of an instance some of whose services run: they are taken over, and the others started where
            they were. None: nothing runs.
    """

    def __init__(self, instance: Instance, options: UpOptions, report: Report, found: State | None = None) -> None:
        self._instance = instance
        self._options = options
        self._report = report
        self._spawned_at: dict[str, float] = {}
        self._environments: dict[str, dict[str, str]] = {}
        self._is_new = found is None
        self.processes: dict[str, ChildProcess | FoundProcess] = {}
        self.state = found or State(
            model=options.model, redis_url=options.redis_url, drain_limit=options.drain_limit, asked=options.asked
        )
        for service in self.state.services:
            if find(service) is not None:
                self.processes[service.name] = FoundProcess(service)
        self._plan = self._ports(listeners(options))

    async def start_all(self) -> None:
        """Start everything that does not run, what takes longest first. Raises LauncherError."""
        for kind in (EXECUTOR, SCHEDULER, TOKENIZER):  # what is missing is said before anything is started
            service_credentials(kind, self._options.environment)
        check_ports({name: listener for name, listener in self._plan.items() if name not in self.processes})
        if self._options.redis_url:
            await self._check_redis()
        if self._is_new:
            make_link_token(self._instance, self._options.environment)
        environment = with_link_token(self._instance, self._options.environment)
        self._options = replace(self._options, environment=environment)
        executors = [name for name in self._plan if name.startswith(EXECUTOR)]
        for name in executors:
            await self._ensure(name)
        if not self._options.redis_url:
            await self._start_redis()
        self._report.begin(executors[0], self._what(executors[0]))
        for name in executors:
            await self._await_address(name)
        await self._ensure(SCHEDULER)
        await self._await_address(SCHEDULER)
        await self._ensure(TOKENIZER)
        for name in executors:
            if name != executors[0]:
                self._report.begin(name, self._what(name))
            await self._await_healthy(name)
        self._report.begin(SCHEDULER, "connecting to the executors")
        await self._await_healthy(SCHEDULER)
        self._report.begin(TOKENIZER, "loading the vocabulary")
        await self._await_address(TOKENIZER)
        await self._await_healthy(TOKENIZER)

    def _what(self, executor: str) -> str:
        """The work of an executor until it is healthy."""
        is_fake = self._options.engine == "fake"
        return "running fake engine" if is_fake else f"loading the weights of {self._options.executor_models[executor]}"

    def undo(self) -> None:
        """End what was started here. What was found running stays, and so do the logs."""
        terminate([self.state.service(name) for name in self._spawned_at], _UNDO_LIMIT)
        if self._is_new:
            remove_scratch(self.state.scratch)
            self._instance.remove(keep_logs=True)

    async def start_again(self, name: str) -> None:
        """Start a service that has ended, where it was, with the settings that it had. Raises LauncherError."""
        old = self.state.service(name)
        await self._start(name, old.kind)
        self.change(name, restarts=old.restarts + 1)

    def change(self, name: str, **fields: object) -> None:
        """Change what is recorded of a service."""
        self.set_state(self.state.with_service(replace(self.state.service(name), **fields)))  # type: ignore[arg-type]

    def set_state(self, state: State) -> None:
        """Record the instance's state."""
        self.state = state
        self._instance.save(state)

    def _ports(self, plan: Mapping[str, Listener]) -> dict[str, Listener]:
        """The plan with the ports that services had before: others know them by these."""
        known = {service.name: service for service in self.state.services}

        def before(name: str, listener: Listener) -> Listener:
            if name not in known:
                return listener
            was = known[name]
            return replace(
                listener,
                port=_port(was.address) or listener.port,
                metrics_port=_port(was.metrics_address) or listener.metrics_port,
                http_port=_port(was.http_address) or listener.http_port,
            )

        return {name: before(name, listener) for name, listener in plan.items()}

    async def _check_redis(self) -> None:
        where = shown(self._options.redis_url)
        self._report.begin(REDIS, f"asking {where}")
        health = await ask_redis(self._options.redis_url)
        if health.error:
            raise LauncherError(
                f"REDIS_URL: {where} cannot be used: {health.error}; correct REDIS_URL, "
                "or unset it to use an embedded one"
            )
        self._report.done(f"{where}, version {health.version or 'unknown'}")

    async def _start_redis(self) -> None:
        self._report.begin(REDIS, "starting the embedded server")
        if not self.state.redis_url:
            socket, scratch = choose_socket(self._instance.folder)
            self.set_state(replace(self.state, redis_url=f"unix://{socket}", scratch=scratch))
        await self._ensure(REDIS)
        socket = self._redis_socket
        self.change(REDIS, address=str(socket))

        async def answers() -> bool:
            return socket.exists() and not (await ask_redis(self.state.redis_url)).error

        await self._wait(REDIS, answers, _REDIS_START_LIMIT)
        health = await ask_redis(self.state.redis_url)
        self._report.done(f"embedded, version {health.version}, {self._age(REDIS)}")

    @property
    def _redis_socket(self) -> Path:
        return Path(self.state.redis_url.removeprefix("unix://"))

    async def _ensure(self, name: str) -> None:
        """Start a service unless it runs."""
        if name not in self.processes:
            await self._start(name, EXECUTOR if name.startswith(EXECUTOR) else name)

    async def _start(self, name: str, kind: str) -> None:
        known = {service.name: service for service in self.state.services}
        announce = self._instance.announce_file(name)
        if name in known:
            announce.unlink(missing_ok=True)
        if kind == REDIS:
            self._instance.redis_data.mkdir(mode=0o700, exist_ok=True)
            command = redis_command(find_redis_server(), self._redis_socket, self._instance.redis_data)
        else:
            plan = self._ports(self._plan)
            command = service_command(self._options, name, kind, plan[name], announce, self._upstream(kind))
        spawning = asyncio.create_task(self._spawn(name, kind, command, known.get(name)))
        try:
            await asyncio.shield(spawning)
        except asyncio.CancelledError:
            await spawning  # a process that runs is recorded, or nobody would know of it, and end it
            raise

    async def _spawn(self, name: str, kind: str, command: Sequence[str], old: ServiceRecord | None) -> None:
        log = self._instance.log_file(name)
        record, process = await spawn(name, kind, command, log, self._environment(name, kind), again=old is not None)
        if old is not None:
            kept = ("address", "metrics_address", "http_address", "restarts", "ended_at", "reason")
            record = replace(record, **{field: getattr(old, field) for field in kept})
        self.processes[name] = process
        self._spawned_at[name] = time.monotonic()
        self.set_state(self.state.with_service(record))

    def _environment(self, name: str, kind: str) -> dict[str, str]:
        """A service's environment: the same whenever it is started, made-up secrets included."""
        if name not in self._environments:
            self._environments[name] = (
                child_environment(self._options.environment)
                if kind == REDIS
                else service_environment(self._options, kind, self.state.redis_url)
            )
        return self._environments[name]

    def _upstream(self, kind: str) -> str:
        """Addresses of the services that do the work of a service."""
        next_kind = {SCHEDULER: EXECUTOR, TOKENIZER: SCHEDULER}.get(kind, "")
        return ",".join(service.address for service in self.state.of_kind(next_kind))

    async def _await_address(self, name: str) -> None:
        """Return once the service listens."""
        announce = self._instance.announce_file(name)

        async def is_announced() -> bool:
            return announce.exists()

        await self._wait(name, is_announced, self._options.start_limit)
        self.change(name, **_read_announced(self._instance.read_announced(name)))

    async def _await_healthy(self, name: str) -> None:
        """Return once the service is ready to work."""
        service = self.state.service(name)
        with Probe(service.address, service_credentials(service.kind, self._options.environment)) as probe:

            async def is_serving() -> bool:
                return await asyncio.to_thread(probe.health) == SERVING

            await self._wait(name, is_serving, self._options.start_limit)
        self._report.done(f"{service.address}, {self._age(name)}")

    async def _wait(self, name: str, is_ready: Callable[[], Awaitable[bool]], limit: float) -> None:
        """Return once ready; LauncherError when anything ends meanwhile, or `limit` seconds after it was spawned."""
        began = self._spawned_at.get(name, time.monotonic())
        while not await is_ready():
            for other, process in self.processes.items():
                if not process.is_running:
                    service = self.state.service(other)
                    told = "" if last_error(service.log) else _quoted(service.log)
                    raise LauncherError(f"{explain_end(service, await process.wait())}{told}")
            log = self.state.service(name).log
            if time.monotonic() - began > limit:
                raise LauncherError(f"{name} is not healthy after {limit:.0f} s; its log: {log}{_quoted(log)}")
            said = last_message(log)
            self._report.waiting(f"{self._age(name)}, {said}" if said else self._age(name))
            await asyncio.sleep(_POLL)

    def _age(self, name: str) -> str:
        began = self._spawned_at.get(name)
        return f"{time.monotonic() - began:.1f} s" if began is not None else "was running"


def explain_end(service: ServiceRecord, code: int | None) -> str:
    """One line about the end of a service: its exit and the reason in its log.

    Args:
        service: The service.
        code: As in `describe_exit`; None: not known.
    """
    how = f"ended with {describe_exit(code)}" if code is not None else "ended"
    if code == -signal.SIGKILL:
        how += " (out of memory?)"
    if error := last_error(service.log):
        how += f": {error}"
    return f"{service.name} {how} (log: {service.log})"


def _read_announced(lines: Sequence[str]) -> dict[str, str]:
    """The service's addresses, as seen from this machine, by their fields of a record."""
    named = dict(line.split("=", 1) for line in lines[1:] if "=" in line)
    http = named.get("http", "")
    return {
        "address": local_address(lines[0]),
        "metrics_address": named.get("metrics", ""),
        "http_address": local_address(http) if http else "",
    }


def _port(address: str) -> int:
    return split_address(address)[1] if address else 0


def _quoted(log: str) -> str:
    return "".join(f"\n  {line}" for line in last_lines(log)[-5:])
