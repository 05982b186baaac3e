"""The plan of a start: the options of `up`, turned into commands."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from scalellm.launcher.errors import LauncherError
from scalellm.launcher.instance import EXECUTOR, SCHEDULER, TOKENIZER
from scalellm.services.common.addresses import bound_socket, join_address
from scalellm.services.common.child_environment import EXPORT, child_environment
from scalellm.services.common.logs import LogFormat
from scalellm.services.common.served_models import join_models

PUBLIC_PORT = 50051
HTTP_PORT = 8000
SCHEDULER_PORT = 50052
EXECUTOR_PORT = 50061
_LAST_PORT = 65535
_METRICS_HOST = "127.0.0.1"  # the services' default
_METRICS_OFFSET = -40900  # 50051 -> 9151, 50052 -> 9152, 50061 -> 9161


class EngineKind(StrEnum):
    """The kind of engine in the executors."""

    MODEL = "model"
    FAKE = "fake"


def _service_modules() -> Mapping[str, Sequence[str]]:
    return {kind: (sys.executable, "-m", f"scalellm.services.{kind}") for kind in (EXECUTOR, SCHEDULER, TOKENIZER)}


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The options of `up`.

    Args:
        models: Path of each model by the name under which it is served, the default first.
        home: The model store.
        environment: Environment of the services; SCALELLM_<SERVICE>_<SETTING> reaches their other settings.
        redis_url: The user's Redis; empty for an embedded one.
        host: Address on which the public service listens; the others listen on the loopback interface.
        port: Port of the public service; 0 takes free ports for it and for all others that are not given.
        http_port: Its port for HTTP; by default the usual one, or a free one where `port` is not the usual one.
        scheduler_port: Port of the scheduler.
        executor_port: Port of the first executor; the others take the next ones.
        executors: Number of executors of each model.
        engine: Kind of engine in the executors.
        drain_limit: Seconds that running requests get to finish on `down`.
        start_limit: Seconds that a service gets to become healthy.
        max_restarts: Crashes of a service within ten minutes that are followed by a restart; the next one is not.
        log_format: Log format of the services, unless SCALELLM_<SERVICE>_LOG_FORMAT says otherwise.
        programs: Command per kind of service, before its options.

    Raises LauncherError for several models that a service cannot be told of in one option.
    """

    models: Mapping[str, Path]
    home: Path
    environment: Mapping[str, str]
    redis_url: str = ""
    host: str = "127.0.0.1"
    port: int = PUBLIC_PORT
    http_port: int | None = None
    scheduler_port: int | None = None
    executor_port: int | None = None
    executors: int = 1
    engine: EngineKind = EngineKind.MODEL
    drain_limit: float = 30.0
    start_limit: float = 600.0
    max_restarts: int = 5
    log_format: LogFormat = "text"
    programs: Mapping[str, Sequence[str]] = field(default_factory=_service_modules)

    def __post_init__(self) -> None:
        if len(self.models) > 1:
            try:
                join_models(self.models)
            except ValueError as error:
                raise LauncherError(f"--model: {error}") from None

    def to_message(self) -> dict[str, Any]:
        """As JSON can hold it; with the environment, and the secrets in there."""
        models = [[name, str(path)] for name, path in self.models.items()]  # a list, as their order counts
        return {**asdict(self), "models": models, "home": str(self.home)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> UpOptions:
        """The options that became `message`."""
        models = {name: Path(path) for name, path in message["models"]}
        paths = {"models": models, "home": Path(message["home"])}
        return cls(**{**message, **paths, "engine": EngineKind(message["engine"])})

    @property
    def model(self) -> str:
        """The names of the models, with commas in between."""
        return ", ".join(self.models)

    @property
    def executor_models(self) -> dict[str, str]:
        """Each executor's name and that of its model; those of one model stand together."""
        names = (name for name in self.models for _ in range(self.executors))
        return {f"{EXECUTOR}-{index}": name for index, name in enumerate(names)}

    @property
    def asked(self) -> dict[str, Any]:
        """The options that tell two instances apart: not the environment, nor options only for the starting process."""
        aside = ("environment", "programs", "start_limit", "max_restarts")
        return {name: value for name, value in self.to_message().items() if name not in aside}


@dataclass(frozen=True, slots=True)
class Listener:
    """The address at which a service is to listen; ports of 0 are free ones. Only the public one listens for HTTP."""

    host: str
    port: int
    metrics_port: int
    option: str
    http_port: int | None = None


def listeners(options: UpOptions) -> dict[str, Listener]:
    """Each service's name and where it is to listen, in the order of starting."""
    fixed = options.port != 0

    def listener(host: str, given: int | None, default: int, option: str) -> Listener:
        port = given if given is not None else default if fixed else 0
        # Metrics go where dashboards look for them while the ports are the usual ones.
        metrics = default + _METRICS_OFFSET if port == default else 0
        return Listener(host, port, metrics, option)

    plan: dict[str, Listener] = {}
    for index, name in enumerate(options.executor_models):
        given = options.executor_port + index if options.executor_port else options.executor_port
        plan[name] = listener("127.0.0.1", given, EXECUTOR_PORT + index, "--executor-port")
    plan[SCHEDULER] = listener("127.0.0.1", options.scheduler_port, SCHEDULER_PORT, "--scheduler-port")
    public = listener(options.host, options.port, PUBLIC_PORT, "--port")
    usual = HTTP_PORT if options.port == PUBLIC_PORT else 0
    plan[TOKENIZER] = replace(public, http_port=usual if options.http_port is None else options.http_port)
    return plan


def check_ports(plan: Mapping[str, Listener]) -> None:
    """Raise LauncherError for the first port that is taken, before anything is started."""
    for name, listener in plan.items():
        wanted = [
            (name, listener.host, listener.port, listener.option),
            (f"metrics of {name}", _METRICS_HOST, listener.metrics_port, "--port"),
            ("HTTP", listener.host, listener.http_port or 0, "--http-port"),
        ]
        for what, host, port, option in wanted:
            if port > _LAST_PORT:
                raise LauncherError(f"port {port} ({name}) is above {_LAST_PORT}; choose a lower {option}")
            if port and not _is_free(host, port):
                raise LauncherError(
                    f"port {port} ({what}) is in use{_user_of(port)}; stop what uses it, or choose other ports "
                    f"with {option} (--port 0: any free ones)"
                )


def _is_free(host: str, port: int) -> bool:
    try:
        bound_socket(host, port).close()
    except PermissionError:
        raise LauncherError(f"port {port} needs more rights than this user has; choose one above 1023") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise LauncherError(f"cannot listen on {join_address(host, port)}: {error.strerror}; check --host") from None
    return True


def _user_of(port: int) -> str:
    """Return the process that listens on the port, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            laddr = connection.laddr
            if connection.status == psutil.CONN_LISTEN and laddr and laddr.port == port and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def service_command(
    options: UpOptions, name: str, kind: str, listener: Listener, announce: Path, upstream: str
) -> list[str]:
    """The command of one service. `upstream`: where it sends its work, the executors' addresses or the scheduler's."""
    command = [*options.programs[kind], "--host", listener.host, "--port", str(listener.port)]
    command += ["--metrics-port", str(listener.metrics_port), "--announce", str(announce)]
    command += ["--drain-limit-s", f"{options.drain_limit:g}"]
    if kind in (EXECUTOR, TOKENIZER):
        served = [options.executor_models[name]] if kind == EXECUTOR else list(options.models)
        command += [*_model_options({model: options.models[model] for model in served}), "--home", str(options.home)]
    if kind == EXECUTOR:
        command += ["--engine", options.engine.value]
        if (number := len(options.executor_models)) > 1:  # they share the processors
            command += ["--num-threads", str(max(1, (os.cpu_count() or 1) // number))]
    if kind == SCHEDULER:
        command += ["--executors", upstream]
    if kind == TOKENIZER:
        command += ["--scheduler", upstream, "--http-port", str(listener.http_port)]
    return command


def _model_options(models: Mapping[str, Path]) -> list[str]:
    """The options that name the models of a service."""
    if len(models) > 1:
        return ["--model", join_models(models)]
    ((name, path),) = models.items()
    return ["--model", str(path), "--model-name", name]


def service_environment(options: UpOptions, kind: str, redis_url: str) -> dict[str, str]:
    """The environment of one service, with its own settings and not those of the others.

    Secrets travel here: commands can be read by every user of the machine.
    """
    environment = child_environment(options.environment, f"SCALELLM_{kind.upper()}_*", EXPORT)
    environment.setdefault(f"SCALELLM_{kind.upper()}_LOG_FORMAT", options.log_format)
    if kind == TOKENIZER:  # nobody outside this instance can tell from timings what others have asked
        environment.setdefault("SCALELLM_TOKENIZER_SALT_SECRET", secrets.token_hex(32))
    if kind in (SCHEDULER, TOKENIZER):
        environment[f"SCALELLM_{kind.upper()}_REDIS_URL"] = redis_url
    return environment
