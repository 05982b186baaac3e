"""The context of every command: the environment as read in main, the output, and exit codes."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import RenderableType
from rich.text import Text

from scalellm.cli.output import Terminal, one_line
from scalellm.client import NO_CREDENTIALS, Client, ClientError, Credentials
from scalellm.launcher import PUBLIC_PORT, Instance, NotRunningError
from scalellm.services.common.addresses import is_loopback, split_address


class ExitCode(IntEnum):
    """The exit codes of the process; `scalellm --help` lists them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    DEADLINE = 4
    BUSY = 5
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


_EXIT_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.USAGE,
    grpc.StatusCode.OUT_OF_RANGE: ExitCode.USAGE,
    grpc.StatusCode.UNAUTHENTICATED: ExitCode.USAGE,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.DEADLINE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExitCode.BUSY,
    grpc.StatusCode.UNAVAILABLE: ExitCode.BUSY,
    grpc.StatusCode.CANCELLED: ExitCode.INTERRUPTED,
}


# gRPC's own message about a message that is too long; a server's RESOURCE_EXHAUSTED has another one.
_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)")

_PIPE_WIDTH = 1000

DEFAULT_INSTANCE = "default"


MAX_UINT32 = 2**32 - 1
"""Largest count in a request."""

ModelOption = Annotated[
    str,
    typer.Option(metavar="NAME", help="One of the models that are served. Default: the first.", show_default=False),
]
"""Option --model of the commands that call a server."""

# gRPC counts a deadline in nanoseconds of a 64-bit clock; a century is beyond any use and far from its end.
_MAX_TIMEOUT = 3_000_000_000


class CliError(Exception):
    """The command fails with one line that says what to do."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment variables that the command line understands.

    Args:
        home: SCALELLM_HOME: models and running instances. Default: ~/.cache/scalellm.
        instance: SCALELLM_INSTANCE: which set of services. Default: default.
        address: SCALELLM_ADDRESS: host:port of the server to call; empty: the instance's.
        redis_url: REDIS_URL: the Redis to use; empty: an embedded one.
        variables: All of them, for the services.
        credentials: SCALELLM_API_KEY, SCALELLM_TLS, SCALELLM_TLS_CA, SCALELLM_TLS_CERT, SCALELLM_TLS_KEY: for a secured
            server.
        metrics_credentials: SCALELLM_METRICS_TLS_CA, _CERT, _KEY: for metrics endpoints that speak TLS.
    """

    home: Path
    instance: str
    address: str
    redis_url: str
    variables: Mapping[str, str]
    credentials: Credentials = NO_CREDENTIALS
    metrics_credentials: Credentials = NO_CREDENTIALS

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Environment:
        """From os.environ, in main and nowhere else."""
        user_home = Path(variables.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
        return cls(
            home=Path(variables.get("SCALELLM_HOME") or user_home / ".cache" / "scalellm").expanduser(),
            instance=variables.get("SCALELLM_INSTANCE") or DEFAULT_INSTANCE,
            address=variables.get("SCALELLM_ADDRESS", ""),
            credentials=Credentials(
                variables.get("SCALELLM_API_KEY", ""),
                _path(variables, "SCALELLM_TLS_CA"),
                _path(variables, "SCALELLM_TLS_CERT"),
                _path(variables, "SCALELLM_TLS_KEY"),
                tls=variables.get("SCALELLM_TLS", "").lower() not in ("", "0", "false"),
            ),
            metrics_credentials=Credentials(
                "",
                _path(variables, "SCALELLM_METRICS_TLS_CA"),
                _path(variables, "SCALELLM_METRICS_TLS_CERT"),
                _path(variables, "SCALELLM_METRICS_TLS_KEY"),
            ),
            redis_url=variables.get("REDIS_URL", ""),
            variables=dict(variables),
        )


def _path(variables: Mapping[str, str], name: str) -> Path | None:
    return Path(variables[name]) if variables.get(name) else None


@dataclass(frozen=True, slots=True)
class CliContext:
    """One invocation: `out` is for results, `err` for progress and errors."""

    environment: Environment
    out: Terminal
    err: Terminal

    @classmethod
    def of(cls, ctx: typer.Context) -> CliContext:
        """The one that main made."""
        found = ctx.find_object(CliContext)
        assert found is not None
        return found

    @property
    def instance(self) -> Instance:
        """The instance that the command is about."""
        return Instance(self.environment.home, self.environment.instance)

    def command(self, name: str) -> str:
        """The command line of a command about this instance."""
        chosen = "" if self.instance.name == DEFAULT_INSTANCE else f" --instance {self.instance.name}"
        return f"scalellm{chosen} {name}"

    def with_instance(self, name: str) -> CliContext:
        """The same about another instance."""
        return replace(self, environment=replace(self.environment, instance=name))

    def with_credentials(self, given: Mapping[str, Any]) -> CliContext:
        """The same with those fields of the credentials in place of the environment's."""
        credentials = replace(self.environment.credentials, **given)
        return replace(self, environment=replace(self.environment, credentials=credentials))

    def address(self, given: str) -> str:
        """Return the address to call: as given, as in the environment, where the instance runs, or the default port.

        Raises NotRunningError for an instance that was named and does not run: the default port is another's.
        """
        if given or self.environment.address:
            return given or self.environment.address
        instance = self.instance
        state = instance.load()
        if state is not None and state.public_address:
            return state.public_address
        if instance.name != DEFAULT_INSTANCE:
            raise NotRunningError(f"not running (instance {instance.name!r})")
        return f"127.0.0.1:{PUBLIC_PORT}"

    def connect(self, address: str) -> Client:
        """A client of the server to call. Raises CliError for what is not host:port."""
        chosen = self.address(address)
        try:
            split_address(chosen)
        except ValueError as error:
            raise CliError(f"--address (SCALELLM_ADDRESS): {error}", ExitCode.USAGE) from None
        return Client(chosen, credentials=self.environment.credentials)

    def table(self, table: RenderableType) -> None:
        """A table, or several, as result; in a pipe each row is one line, however long."""
        console = self.out if self.out.is_terminal else Terminal(file=self.out.file, width=_PIPE_WIDTH)
        console.print(table)

    def note(self, text: str) -> None:
        """A line beside the result."""
        self.err.print(Text(text, style="dim"), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line about something that went wrong without ending the command."""
        self.err.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    def error(self, text: str) -> None:
        """The line with which a command fails."""
        self.err.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def _is_here(address: str) -> bool:
    try:
        return is_loopback(split_address(address)[0])
    except ValueError:
        return False


def check_timeout(seconds: float | None) -> None:
    """Raise CliError for a --timeout that is not a useful deadline."""
    if seconds is not None and not 0 < seconds <= _MAX_TIMEOUT:
        raise CliError(f"--timeout: must be above 0 and at most {_MAX_TIMEOUT} s, got {seconds:g}", ExitCode.USAGE)


def in_options(message: str) -> str:
    """Name options of the command line where the client library names fields of its Credentials."""
    names = re.compile(r"(?<![\w./-])tls(_(ca|cert|key))?(?![\w./-])")
    return names.sub(lambda name: f"--{name[0].replace('_', '-')}", message)


def explain(error: ClientError) -> tuple[str, ExitCode]:
    """One line that says what to do about a failed call, and the exit code for it."""
    if error.unreachable:
        # A server elsewhere cannot be started from here.
        what = "start it with: scalellm up" if _is_here(error.unreachable) else "check the address, and that it runs"
        return f"no ScaleLLM server answers at {error.unreachable}; {what}", ExitCode.NOT_RUNNING
    if error.misconfigured:
        return one_line(in_options(error.message)), ExitCode.USAGE
    code = _EXIT_CODES.get(error.code, ExitCode.FAILED)
    message = one_line(in_options(error.message))
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(message)):
        return f"the request is too large: {sizes[1]} bytes, at most {sizes[2]}", ExitCode.USAGE
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        return f"{message}: set SCALELLM_API_KEY, or give --api-key before the command", code
    if error.code is grpc.StatusCode.UNIMPLEMENTED:
        return f"the server offers no such call ({message}): is this the address of a tokenizer?", ExitCode.FAILED
    if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        # If the deadline passed in this process, the message is gRPC's own.
        said = "" if "Deadline Exceeded" in message else f" ({message})"
        message = f"out of time{said}; allow more with --timeout"
    elif error.retry_after is not None:
        message += f"; try again in {error.retry_after:.1f} s"
    elif code is ExitCode.FAILED:
        message += f" ({error.code.name})"
    return message, code
