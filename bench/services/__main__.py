"""`make bench-tokenizer`, `bench-scheduler`, `bench-executor`, `bench-line`: a service alone, load rising.

The neighbours are simulated, each in a process of its own, and cost little; where they or the machine's cores are
what limits a figure, a line says so. CPU time per token means something on a busy machine, too; rates and latencies do
only where cores are idle.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from bench.services import executor, line, scheduler, tokenizer
from bench.services.measure import FULL, QUICK
from bench.services.report import report
from scalellm.services.common.model_store import pull, resolve
from scalellm.services.common.model_store.catalogue import CATALOGUE


class Target(enum.StrEnum):
    """The measured service."""

    TOKENIZER = "tokenizer"
    SCHEDULER = "scheduler"
    EXECUTOR = "executor"
    LINE = "line"


def main(
    target: Annotated[Target, typer.Argument(help="The service; line: all of them on a fake H200.")],
    model: Annotated[str, typer.Option(help="A name from `scalellm models list`, or a path.")] = (
        "smollm2-135m-instruct"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Less than a second per figure: a test, not figures.")] = False,
    home: Annotated[Path, typer.Option(envvar="SCALELLM_HOME", help="The model store.")] = Path("~/.cache/scalellm"),
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """Load one service between simulated neighbours and find its ceiling."""
    timing = QUICK if quick else FULL
    if target is Target.SCHEDULER:
        report(target, scheduler.run(timing), output)
        return
    home = home.expanduser()
    if model in CATALOGUE:
        pull(model, home)
    path = resolve(model, home)
    run = {Target.TOKENIZER: tokenizer.run, Target.EXECUTOR: executor.run, Target.LINE: line.run}[target]
    report(target, run(timing, path), output)


if __name__ == "__main__":
    typer.run(main)
