"""`scalellm config`: every setting there is, and what it is set to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scalellm.cli.context import CliContext
from scalellm.cli.output import write_line
from scalellm.cli.service_settings import check_options, document, option_lines, read_config

app = typer.Typer(help="Settings: which there are, what they are.", no_args_is_help=True, rich_markup_mode=None)

_META = "scalellm.config"

SHOW_HELP = """Print all settings of `scalellm up` and of the services it starts, as a TOML file.

What is set in the file, or by SCALELLM_<SERVICE>_<SETTING> in the environment, which goes before it, stands
with where it comes from; all else is a comment with its default. Written to a file, it is one for
`scalellm up --config`.

\\b
Examples:
  scalellm config show >scalellm.toml
  scalellm config show --config scalellm.toml
"""


def register(root: typer.Typer) -> None:
    """Add the commands to the application."""
    root.add_typer(app, name="config")


@app.command("show", help=SHOW_HELP, short_help="Print all settings as a TOML file.")
def show(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file for `up`, to show with its values.")
    ] = None,
) -> None:
    """The file that would do the same."""
    context = CliContext.of(ctx)
    options, variables = read_config(config) if config is not None else ({}, {})
    params = up_options(ctx)
    if config is not None:
        check_options(options, params, config)
    sources = dict.fromkeys(variables, str(config))
    for name, value in context.environment.variables.items():
        if value:
            variables[name], sources[name] = value, name
    for line in (*option_lines(params, options), *document(variables, sources)):
        write_line(line)


def up_options(ctx: typer.Context) -> dict[str, Any]:
    """Return the options of `up`, as the command line knows them, by the names that they have in a file."""
    root: Any = ctx.find_root().command
    return {param.name: param for param in root.commands["up"].params if param.name not in ("config", "help")}


def take_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let the options of `up` default to what a file says; a callback of its --config, which is read first."""
    if path is not None:
        options, variables = read_config(path)
        known = up_options(ctx)
        check_options(options, known, path)
        # What may be given several times may stand as one text, too.
        ctx.default_map = {
            name: [value] if known[name].multiple and isinstance(value, str) else value
            for name, value in options.items()
        }
        ctx.meta[_META] = variables
    return path


def variables_of(ctx: typer.Context) -> dict[str, Any]:
    """Return the variables of the services that the file says."""
    return dict(ctx.meta.get(_META, {}))
