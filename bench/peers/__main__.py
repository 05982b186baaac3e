"""`make bench-peers`: every peer that can be installed here and ScaleLLM, in turns, in one run."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from bench.load.vocabulary import Vocabulary
from bench.peers.environments import Environments, PeerError
from bench.peers.measure import Plan, Round, measure_round, summarise
from bench.peers.memory import read_bandwidth
from bench.peers.ours import Ours
from bench.peers.report import Report, console, machine
from bench.peers.shapes import SHAPES
from bench.peers.systems import PEERS, Form, System
from bench.peers.weights import Weights
from bench.peers.workloads import Workload, workloads
from scalellm.services.common.model_store import pull, resolve
from scalellm.services.common.model_store.catalogue import CATALOGUE

_RESULTS = Path(__file__).resolve().parents[1] / "results"
# A system this many times slower than the fastest one so far is not waited for under more and longer loads.
_TOO_SLOW = 4.0


class Comparison:
    """The run: in each round systems in order, forms of each in order.

    A machine that is faster for some minutes is so for all of them then, if one has a round after the other rather
    than all of its rounds at once. Each round has a server of its own, and none runs beside it: one that waits may
    still compute, and keeps memory and caches.

    Args:
        plan: Number and length of measurements.
        loads: For each form; those about prefixes for the fastest form of a system only, unless `every_form`.
        forms: Names to keep; empty: all.
        everything: All loads on all forms, however long it takes.
        report: Takes everything in.
        save: Called after each measurement.
        screen: Console for its progress.
    """

    def __init__(
        self,
        plan: Plan,
        loads: Sequence[Workload],
        forms: Sequence[str],
        everything: bool,
        report: Report,
        save: Callable[[], None],
        screen: Console,
    ) -> None:
        self._plan = plan
        self._loads = loads
        self._forms = forms
        self._everything = everything
        self._report = report
        self._save = save
        self._screen = screen
        self._rounds: dict[tuple[str, str, str], list[Round]] = {}

    def run(self, systems: Iterable[System], folder: Path) -> None:
        """All rounds of all systems. What cannot be measured is in the report, with the reason."""
        entrants = [
            (system, form)
            for system in systems
            if self._is_prepared(system)
            for form in system.forms
            if not self._forms or form.name in self._forms
        ]
        fixed = [load for load in self._loads if not load.is_prefix]
        if self._everything or not fixed:
            self._run_rounds(entrants, self._loads, folder)
            return
        self._run_rounds(entrants, fixed, folder)
        fastest = [entrant for entrant in entrants if self._is_fastest(*entrant, fixed[-1])]
        self._run_rounds(fastest, [load for load in self._loads if load.is_prefix], folder)

    def _is_prepared(self, system: System) -> bool:
        self._say(f"{system.name}: preparing")
        try:
            self._report.versions[system.name] = system.prepare()
        except PeerError as error:
            self._fail(system.name, str(error))
            return False
        return True

    def _run_rounds(self, entrants: Sequence[tuple[System, Form]], loads: Sequence[Workload], folder: Path) -> None:
        for number in range(self._plan.rounds):
            for system, form in entrants:
                if number == 0:
                    self._run_form(system, form, loads, number, folder, partial(self._is_wanted, system))
                # What failed or was not waited for in the first round is not tried again.
                elif again := [load for load in loads if (system.name, form.name, load.name) in self._rounds]:
                    self._run_form(system, form, again, number, folder, lambda load: True)

    def _run_form(
        self,
        system: System,
        form: Form,
        loads: Sequence[Workload],
        number: int,
        folder: Path,
        is_wanted: Callable[[Workload], bool],
    ) -> None:
        if not loads:
            return
        self._say(f"{system.name} {form.name}: starting, round {number + 1} of {self._plan.rounds}")
        take = partial(self._take, system, form)
        try:
            measure_round(system, form, loads, number, self._plan, folder, take, is_wanted)
        except (PeerError, RuntimeError, OSError) as error:
            self._fail(f"{system.name} {form.name}", str(error))

    def _take(self, system: System, form: Form, load: Workload, found: Round) -> None:
        rounds = self._rounds.setdefault((system.name, form.name, load.name), [])
        rounds.append(found)
        self._report.put(summarise(system, form, load, rounds))
        self._save()
        one = summarise(system, form, load, [found])
        self._say(
            f"{one.system} {one.form}, {one.workload}: {one.rate:.1f} tok/s, decode {one.decode_rate:.1f}, "
            f"TTFT {one.ttft_p50_s:.2f} / {one.ttft_p99_s:.2f} s, {one.peak_mb:,.0f} MB"
        )

    def _is_fastest(self, system: System, form: Form, load: Workload) -> bool:
        done = [
            entry for entry in self._report.measurements if (entry.system, entry.workload) == (system.name, load.name)
        ]
        return bool(done) and max(done, key=lambda entry: entry.rate).form == form.name

    def _is_wanted(self, system: System, load: Workload) -> bool:
        if self._everything or load.concurrency == 1:
            return True
        rates: dict[str, dict[str, float]] = {}
        for entry in self._report.measurements:
            of_load = rates.setdefault(entry.workload, {})
            of_load[entry.system] = max(of_load.get(entry.system, 0.0), entry.rate)
        for fixed in (entry.name for entry in self._loads if not entry.is_prefix and entry.concurrency > 1):
            mine, most = (rates.get(fixed, {}).get(system.name), max(rates.get(fixed, {}).values(), default=0.0))
            if mine and most > _TOO_SLOW * mine:
                reason = f"{most / mine:.1f} times slower than the fastest at {fixed} at once; --everything waits"
                self._fail(f"{system.name}, {load.name}", reason)
                return False
        return True

    def _fail(self, name: str, reason: str) -> None:
        self._report.failures[name] = reason
        self._save()
        self._say(f"{name}: {reason}")

    def _say(self, text: str) -> None:
        self._screen.print(text, markup=False, highlight=False)


def main(
    systems: Annotated[str, typer.Option(help="Systems, in this order: scalellm and peers; default: all.")] = ",".join(
        ("scalellm", *PEERS)
    ),
    forms: Annotated[str, typer.Option(help="Only these forms of the weights, such as keep,int8,Q8_0.")] = "",
    loads: Annotated[
        str, typer.Option("--workloads", help="Only these loads: fixed, shared (system prompt) and sessions.")
    ] = "fixed,shared,sessions",
    concurrency: Annotated[str, typer.Option(help="fixed: requests at once, one load each.")] = "1,8,64",
    input_len: Annotated[int, typer.Option(min=1, help="fixed: prompt tokens.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="fixed: generated tokens.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each load is run, in turns; the median counts.")] = 1,
    everything: Annotated[
        bool, typer.Option("--everything", help="Prefixes on all forms, not the fastest; all loads on slow systems.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads of each peer; 0: one per processor.")] = 0,
    speculation: Annotated[
        Literal["off", "auto"], typer.Option(help="Drafts of ScaleLLM. No peer drafts by default.")
    ] = "off",
    limit_s: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    quick: Annotated[bool, typer.Option("--quick", help="A few tokens per load: a test, not figures.")] = False,
    install: Annotated[bool, typer.Option(help="Install what is missing, each peer for 20 minutes at most.")] = True,
    seed: Annotated[int, typer.Option(help="All prompts follow from it.")] = 0,
    model: Annotated[str, typer.Option(help="A name from `scalellm models list`, or a path with a .gguf file.")] = (
        "smollm2-135m-instruct"
    ),
    shape: Annotated[
        str, typer.Option(help=f"Random weights in the shape of {' or '.join(SHAPES)}, with --model's tokenizer.")
    ] = "",
    home: Annotated[Path, typer.Option(envvar="SCALELLM_HOME", help="The model store.")] = Path("~/.cache/scalellm"),
    output: Annotated[Path | None, typer.Option(help="The JSON file; default: one in bench/results/.")] = None,
) -> None:
    """Measure throughput, latency and memory of ScaleLLM and its peers on the same weights and prompts."""
    home = home.expanduser()
    if model in CATALOGUE:
        pull(model, home)
    path = resolve(model, home)
    source = path if path.is_file() else next(path.glob("*.gguf"), None)
    if source is None:
        raise typer.BadParameter(f"--model: {path} holds no .gguf file, which all systems' weights are made from")
    try:
        levels = [int(text) for text in concurrency.split(",")]
        chosen = workloads(
            *(loads.split(","), levels, 16 if quick else input_len, 8 if quick else output_len), quick=quick
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"--shape: {shape!r} is not known, only {', '.join(SHAPES)}")
    wanted = systems.split(",")
    threads = threads or len(os.sched_getaffinity(0))
    weights = Weights(source, home / "peers" / "weights")
    if shape:
        weights = weights.in_shape(shape)
        model, path = shape, weights.source
    environments = Environments(home / "peers", may_install=install)
    makers: dict[str, Callable[[], System]] = {
        name: partial(make, environments, weights, threads) for name, make in PEERS.items()
    }
    makers["scalellm"] = partial(Ours, model, path, weights, home, speculation)
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        raise typer.BadParameter(f"--systems: {', '.join(unknown)}: known are {', '.join(makers)}")
    options = {"threads": threads, "rounds": rounds, "seed": seed, "quick": quick, "workloads": loads}
    options |= {
        "speculation": speculation,
        "concurrency": concurrency,
        "input_len": input_len,
        "output_len": output_len,
    }
    report = Report(
        {
            **machine(),
            "read_gb_per_s": None if quick else read_bandwidth(threads),
            "model": model,
            "weights_sha256": weights.sha256,
            "options": options,
        }
    )
    if output is None and not quick:
        cpus = report.header["cpus"]
        output = _RESULTS / f"{datetime.now(UTC).date()}-peers-{cpus}-cores.json"
    plan = Plan(rounds, limit_s, seed, Vocabulary.of_words(path))
    screen = console()
    save = partial(report.write, output) if output is not None else lambda: None
    comparison = Comparison(plan, chosen, [name for name in forms.split(",") if name], everything, report, save, screen)
    # Servers end with the run, and what was measured is shown, however it ends.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix="scalellm-peers-", ignore_cleanup_errors=True) as folder:
            comparison.run([makers[name]() for name in wanted], Path(folder))
    finally:
        report.print(screen)
        if output is not None:
            screen.print(f"written to {output}")


if __name__ == "__main__":
    typer.run(main)
