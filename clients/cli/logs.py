"""`scalellm logs`."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from scalellm.cli.context import CliContext, CliError, ExitCode
from scalellm.cli.output import write_line
from scalellm.launcher import Instance, NotRunningError
from scalellm.launcher.service_logs import LogFollower, merged, shown_line

HELP = """Show the logs of the services, by time, each line behind its service's name.

The logs of an instance that is down are shown, too, if it kept them because something had gone wrong.

\b
Examples:
  scalellm logs
  scalellm logs -f                    go on with what comes, until Ctrl-C or `scalellm down`
  scalellm logs -n 1000 executor      all executors
  scalellm logs supervisor            what ended, and was started again
"""

_INTERVAL = 0.2


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("logs", help=HELP, short_help="Show the logs of the services.")(logs)


def logs(
    ctx: typer.Context,
    services: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SERVICE]...", help="Names, or kinds.", show_default="all"),
    ] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines to begin with.")] = 200,
) -> None:
    """Show lines."""
    context = CliContext.of(ctx)
    chosen = _chosen(context.instance, services or [])
    followers = {name: LogFollower(log) for name, log in chosen.items()}

    def show(name: str, line: str) -> None:
        write_line(shown_line(name, line) if len(chosen) > 1 else line)

    for name, line in deque(merged(followers), maxlen=lines):
        show(name, line)
    try:
        while follow and context.instance.load() is not None:
            time.sleep(_INTERVAL)
            for name, line in merged(followers):
                show(name, line)
    except KeyboardInterrupt:  # the way to end it, not an interruption
        return


def _chosen(instance: Instance, services: list[str]) -> dict[str, Path]:
    """The logs to show, by service. Raises NotRunningError, and CliError for a service that there is not."""
    there = {log.stem: log for log in sorted(instance.logs.glob("*.log"))}
    if not there:
        raise NotRunningError(f"no logs: not running (instance {instance.name!r})")
    for service in services:
        if not any(_is(service, name) for name in there):
            raise CliError(f"no service {service!r} has a log here; there are {', '.join(there)}", ExitCode.USAGE)
    return {name: log for name, log in there.items() if not services or any(_is(service, name) for service in services)}


def _is(service: str, name: str) -> bool:
    return name == service or name.rpartition("-")[0] == service
