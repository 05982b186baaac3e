"""`python -m bench.grammars`: what answers of a given shape cost the steps of the engine, beside answers of none.

Four loads take turns on one engine, so that a neighbour on the machine falls on all of them. `free`: every row may say
anything. `json`: every row writes JSON of the schema of `bench.load --workload json`. `hostile`: a quarter of the rows
has grammars that are to cost as much as can be, one after the other, and the rest may say anything. `coming and going`:
as `hostile`, without grammars: requests of a quarter of the rows stay for as many steps as those of `hostile` did.
Hostile requests mostly end after a few tokens and the next ones come, whose prompts make steps longer whatever their
grammars are; only what is beyond this load is the grammars'. Steps count while most rows decode. Percentiles are those
of the steps of all rounds.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, cycle, islice, repeat
from types import MappingProxyType
from typing import Annotated

import typer

from bench.hostile_grammars import HOSTILE, json_grammar
from bench.load.workload import JSON_SCHEMA
from bench.quality import form_settings
from scalellm.services.common.model_store import resolve
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams

_PROMPT_LEN = 8
_KV_CACHE_BYTES = 1 << 30
_COMPARED = MappingProxyType(
    {"free": "free", "json": "free", "coming and going": "free", "hostile": "coming and going"}
)
"""The loads, and the load that each is compared with."""


@dataclass
class Steps:
    """The steps of one load.

    Attributes:
        wall: Milliseconds of each.
        cpu: CPU milliseconds of each, of the thread that takes them.
        tokens: Tokens of all rows.
        ended_invalid: Requests that were refused, or ended, for their grammar.
        stays: By row, the steps from the first to the last token of each request that ended.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: int = 0
    ended_invalid: int = 0
    stays: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, other: Steps) -> None:
        """Count another round's."""
        self.wall += other.wall
        self.cpu += other.cpu
        self.tokens += other.tokens
        self.ended_invalid += other.ended_invalid

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all rows."""
        return self.tokens / sum(self.wall) * 1e3

    def percentile(self, share: float) -> float:
        """Milliseconds that this share of the steps does not exceed."""
        return sorted(self.wall)[min(len(self.wall) - 1, int(share * len(self.wall)))]


@dataclass(frozen=True)
class Wanted:
    """A request: its grammar, empty for none, and its tokens; 0: as many as there are steps."""

    grammar: str = ""
    tokens: int = 0


def measure(engine: Engine, wanted: list[Iterator[Wanted]], num_steps: int) -> Steps:
    """Keep one row per iterator at work, on its requests, for so many steps.

    A row whose request ends, or is refused for its grammar, goes on with the next one.
    """
    draw, sent, steps = random.Random(0), 0, Steps()
    row_of: dict[tuple[int, int], int] = {}
    first_at: dict[tuple[int, int], int] = {}

    def send(row: int) -> None:
        nonlocal sent
        prompt = tuple(draw.randrange(3, engine.config.vocab_size) for _ in range(_PROMPT_LEN))
        one = next(wanted[row])
        sampling = SamplingParams(temperature=1.0, seed=sent, max_tokens=one.tokens or num_steps + 64, ignore_eos=True)
        engine.add(EngineRequest((0, sent), str(sent), prompt, sampling, grammar=one.grammar))
        row_of[0, sent] = row
        sent += 1

    for row in range(len(wanted)):
        send(row)
    is_full, number = False, 0
    while len(steps.wall) < num_steps:
        if engine.only_awaits_grammars:
            time.sleep(1e-3)
        started, computed = time.perf_counter(), time.thread_time()
        result = engine.step()
        computed, took = time.thread_time() - computed, time.perf_counter() - started
        if result.error is not None:
            raise result.error
        number += 1
        for output in result.tokens:
            first_at.setdefault(output.key, number)
        is_full = is_full or len(first_at) >= 0.75 * len(wanted)
        if is_full:
            steps.wall.append(took * 1e3)
            steps.cpu.append(computed * 1e3)
            steps.tokens += sum(len(output.token_ids) for output in result.tokens)
        for finished in result.finished:
            steps.ended_invalid += bool(finished.message)
            row = row_of.pop(finished.key)
            if finished.key in first_at:
                steps.stays[row].append(number + 1 - first_at[finished.key])
            send(row)
    for key in row_of:
        engine.abort(key)
    while engine.has_unfinished():
        engine.step()
    return steps


def hostile(rows: int) -> list[Iterator[Wanted]]:
    """Return requests by row, those of a quarter with hostile grammars."""
    grammars = [Wanted(grammar) for grammar in HOSTILE.values()]
    return beside_free(rows, lambda row: islice(cycle(grammars), row % len(grammars), None))


def coming_and_going(rows: int, stays: Mapping[int, list[int]]) -> list[Iterator[Wanted]]:
    """Return requests by row without grammars, those of a quarter of the rows for so many steps each."""
    return beside_free(
        rows, lambda row: chain((Wanted(tokens=count) for count in stays.get(row, ())), repeat(Wanted()))
    )


def beside_free(rows: int, requests_of: Callable[[int], Iterator[Wanted]]) -> list[Iterator[Wanted]]:
    """Return requests of their own for a quarter of the rows, and requests without a grammar for the others."""
    return [*map(requests_of, range(rows // 4)), *repeated(Wanted(), rows - rows // 4)]


def repeated(one: Wanted, rows: int) -> list[Iterator[Wanted]]:
    """Return the same request for ever, for each row."""
    return [repeat(one) for _ in range(rows)]


def main(
    model: Annotated[str, typer.Option(help="A name of the model store, or a path.")] = "smollm2-135m-instruct",
    form: Annotated[str, typer.Option(help="Form of the weights.")] = "int8",
    rows: Annotated[int, typer.Option(min=4)] = 64,
    steps: Annotated[int, typer.Option(min=10, help="Steps of each load in each round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0: what the executor would choose.")] = 0,
) -> None:
    """Print a table."""
    path = resolve(model, ExecutorSettings().home)
    settings = form_settings(str(path), form).model_copy(
        update={"num_threads": threads, "kv_cache_memory": _KV_CACHE_BYTES, "max_num_seqs": rows, "prefix_cache": False}
    )
    engine = build_engine(settings, lambda line: print(line, file=sys.stderr)).engine
    found = {name: Steps() for name in _COMPARED}
    for number in range(rounds + 1):
        disturbed = measure(engine, hostile(rows), steps)
        taken = {
            "free": measure(engine, repeated(Wanted(), rows), steps),
            "json": measure(engine, repeated(Wanted(json_grammar(JSON_SCHEMA)), rows), steps),
            "hostile": disturbed,
            "coming and going": measure(engine, coming_and_going(rows, disturbed.stays), steps),
        }
        if number:  # the first round warms up
            for name, one in taken.items():
                found[name].add(one)
    print(
        "| load | compared with | step p50, ms | p99, ms | CPU of the step's thread, ms | tokens/s | ended INVALID |\n"
        "|---|---|---|---|---|---|---|"
    )
    figures: list[Callable[[Steps], float]] = [
        lambda measured: measured.percentile(0.5),
        lambda measured: measured.percentile(0.99),
        lambda measured: statistics.mean(measured.cpu),
        lambda measured: measured.tokens_per_second,
    ]
    for name, other in _COMPARED.items():
        cells = [f"{figure(found[name]):.2f} ({figure(found[name]) / figure(found[other]):.2f})" for figure in figures]
        print(f"| {name} | {other} | {' | '.join(cells)} | {found[name].ended_invalid} |", flush=True)
    os._exit(0)  # as the engine's own process ends


if __name__ == "__main__":
    typer.run(main)
