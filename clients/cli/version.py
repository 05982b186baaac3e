"""`scalellm version`."""

from __future__ import annotations

import typer

from scalellm import __version__
from scalellm.cli.output import write_line


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("version", help="Print the version.")(print_version)


def print_version() -> None:
    """Print the installed version."""
    write_line(f"scalellm {__version__}")
