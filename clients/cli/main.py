"""Entry point of `scalellm`: the only place that reads the environment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from scalellm.cli.context import CliContext, CliError, Environment, ExitCode, explain, in_options
from scalellm.cli.output import Terminal
from scalellm.cli.text import require_utf8
from scalellm.cli.version import print_version
from scalellm.client import ClientError, CredentialsError
from scalellm.launcher import LauncherError, NotRunningError
from scalellm.services.common.model_store import ModelStoreError, UnknownModelError

_HELP = """ScaleLLM: LLM serving over gRPC.

\b
First steps:
  scalellm run                        start everything, answer a prompt, stop
  scalellm up                         start the services in the background
  scalellm generate "Once upon a"     continue a text
  scalellm chat                       talk, with a session on the server
  scalellm sessions list              conversations that the server keeps
  scalellm status                     how the services are
  scalellm top                        what they do, live
  scalellm logs                       what they log
  scalellm down                       drain and stop them
"""

_EPILOG = """\b
Environment:
  SCALELLM_HOME      models and running instances (default: ~/.cache/scalellm)
  SCALELLM_INSTANCE  which set of services (default: default)
  SCALELLM_ADDRESS   host:port of the server to call (default: the instance's)
  SCALELLM_API_KEY   key for a server that asks for one
  SCALELLM_TLS       true: connect over TLS to a server with a certificate of a public authority
  SCALELLM_TLS_CA    PEM file with the authorities of servers, in place of the public ones: connect over TLS
  SCALELLM_TLS_CERT, SCALELLM_TLS_KEY
                     PEM files to show to a server that asks for a certificate
  REDIS_URL          Redis for sessions (default: an embedded redis-server)
  NO_COLOR           no colours
  SCALELLM_<SERVICE>_<SETTING>, such as SCALELLM_EXECUTOR_NUM_BLOCKS=512:
                     settings of the services that `scalellm up` starts; `scalellm config show` lists them
  HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE
                     as in all programs that fetch models from the Hugging Face Hub

\b
Exit codes:
  0 done          1 failed         2 wrong usage or input   3 not running
  4 out of time   5 busy or unavailable: try again later
  130 interrupted (Ctrl-C)   141 output closed   143 terminated
"""


_MODULES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("run", "up", "serve", "down", "status"), "services"),
        **{name: name for name in ("generate", "chat", "tokenize", "logs", "top", "version")},
        **{name: name for name in ("sessions", "models", "keys", "config")},
    }
)
"""The module of each command, in the order of the help."""


class _Commands(Mapping[str, Any]):
    """The commands by name. The module of one is loaded when it is asked for: all take a quarter of the CPU time."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            part = typer.Typer(rich_markup_mode=None)
            import_module(f"scalellm.cli.{_MODULES[name]}").register(part)
            self._loaded |= get_group(part).commands
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


class _Root(TyperGroup):
    """Loads the commands when they are needed, and turns every expected failure into one line and an exit code."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "commands": _Commands()})

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        except BrokenPipeError:
            _discard_output()
            raise typer.Exit(ExitCode.BROKEN_PIPE) from None
        except OSError as error:  # a full disk under the output, say
            _discard_output()
            raise typer.Exit(_report(ctx.find_object(CliContext), error)) from None
        except (CliError, ClientError, CredentialsError, LauncherError, ModelStoreError) as error:
            raise typer.Exit(_report(ctx.find_object(CliContext), error)) from None
        return result


def _discard_output() -> None:
    """Discard buffered output, which would fail again, loudly, when the interpreter closes the stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(context: CliContext, error: Exception) -> ExitCode:
    if isinstance(error, ClientError):
        message, code = explain(error)
        context.error(message)
        return code
    if isinstance(error, NotRunningError):
        context.error(f"{error}; start it with: {context.command('up')}")
        return ExitCode.NOT_RUNNING
    context.error(in_options(str(error)) if isinstance(error, CredentialsError) else str(error))
    if isinstance(error, CliError):
        return error.code
    return ExitCode.USAGE if isinstance(error, UnknownModelError) else ExitCode.FAILED


app = typer.Typer(
    cls=_Root,
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(value: bool) -> None:
    if value:
        print_version()
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    *,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    instance: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the set of services, for more than one on a machine.")
    ] = "",
    api_key: Annotated[
        str, typer.Option(metavar="KEY", help="For a secured server; other users can read it here: SCALELLM_API_KEY.")
    ] = "",
    tls: Annotated[
        bool, typer.Option("--tls", help="Use TLS; servers show a certificate of a public authority.")
    ] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use TLS; authorities of servers, if not the public ones.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate to show.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key of the certificate.")] = None,
) -> None:
    """Options before the command."""
    if instance:
        ctx.obj = CliContext.of(ctx).with_instance(instance)
    options = {"api_key": api_key, "tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
    if given := {name: value for name, value in options.items() if value}:
        ctx.obj = CliContext.of(ctx).with_credentials(given)


def run(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run one command and return its exit code."""
    context = CliContext(
        environment=Environment.read(variables),
        out=Terminal(),
        err=Terminal(stderr=True),
    )
    try:
        for argument in arguments:
            require_utf8(argument, f"the argument {argument!a}")
    except CliError as error:
        return _report(context, error)
    try:
        app(list(arguments), prog_name="scalellm", obj=context)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.FAILED
    return ExitCode.OK


def _on_terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(ExitCode.TERMINATED)


def main() -> None:
    """Console script."""
    signal.signal(signal.SIGTERM, _on_terminate)
    # A stream that the caller closed is None here: there is nothing to read from it, and nobody reads what it is given.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)
    code = run(sys.argv[1:], os.environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it was heard: what is left is to end as it says
    sys.exit(code)


if __name__ == "__main__":
    main()
