"""`scalellm keys`: makes the API keys that the services know."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from scalellm.cli.context import CliContext, CliError, ExitCode
from scalellm.cli.output import write_line

app = typer.Typer(help="API keys for a secured server.", no_args_is_help=True, rich_markup_mode=None)

CREATE_HELP = """Make an API key and print it. It is shown this once: the file holds only its SHA-256.

\b
Examples:
  scalellm keys create --tenant acme --file keys.toml
  scalellm keys create --tenant ops --admin              the entry for the file is shown, too
  SCALELLM_TOKENIZER_API_KEYS=keys.toml scalellm up      read again when it changes
"""


def register(root: typer.Typer) -> None:
    """Add the commands to the application."""
    root.add_typer(app, name="keys")


@app.command("create", help=CREATE_HELP, short_help="Make an API key.")
def create(
    ctx: typer.Context,
    tenant: Annotated[str, typer.Option(help="Tenant of the key: letters, digits, dots, dashes, underscores.")],
    admin: Annotated[bool, typer.Option("--admin", help="May also operate the services.")] = False,
    file: Annotated[Path | None, typer.Option(help="Add the entry to this file.", show_default=False)] = None,
) -> None:
    """The key on standard output, the entry in the file or on standard error."""
    context = CliContext.of(ctx)
    if not re.fullmatch("[A-Za-z0-9._-]{1,64}", tenant):
        raise CliError(
            f"--tenant: use 1 to 64 letters, digits, dots, dashes or underscores, got {tenant!r}", ExitCode.USAGE
        )
    from scalellm.services.common.api_keys import Role, key_entry, new_key  # only here: importing it takes a while

    key = new_key()
    entry = key_entry(key, tenant, Role.ADMIN if admin else Role.USER)
    if file is None:
        context.note(f"add this to the services' --api-keys file:\n\n{entry}")
    else:
        _append(file, entry)
    write_line(key)


def _append(file: Path, entry: str) -> None:
    """Add to a file, or make one that only its owner can read."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a", encoding="utf-8") as stream:
            stream.write(f"\n{entry}" if stream.tell() else entry)
    except OSError as error:
        raise CliError(f"--file: cannot write {file}: {error.strerror}") from None
