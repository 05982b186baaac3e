"""`python -m bench.grammars`: what answers of a given shape cost the steps of the engine, beside answers of none.

Three loads take turns on one engine, so that a neighbour on the machine falls on all of them: `free`, every row may say
anything; `json`, every row writes JSON of the schema of `bench.load --workload json`; `hostile`, a quarter of the rows
has grammars that are to cost as much as can be, one after the other, and the rest may say anything. Steps count while
all rows decode. Reported are medians of the rounds, and of their ratios to `free`.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, repeat
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


@dataclass(frozen=True)
class Steps:
    """The steps of one load in one round: milliseconds each, and what the thread that takes them computed in each."""

    wall: list[float]
    cpu: list[float]
    tokens: int
    ended_invalid: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all rows."""
        return self.tokens / sum(self.wall) * 1e3

    def percentile(self, share: float) -> float:
        """Milliseconds that this share of the steps does not exceed."""
        return sorted(self.wall)[min(len(self.wall) - 1, int(share * len(self.wall)))]


def measure(engine: Engine, grammars: list[Iterator[str]], num_steps: int) -> Steps:
    """Keep one row per iterator at work, on requests with its grammars, for so many steps.

    A row whose request ends, or is refused for its grammar, goes on with the next one.
    """
    draw, row_of, sent = random.Random(0), {}, 0

    def send(row: int) -> None:
        nonlocal sent
        prompt = tuple(draw.randrange(3, engine.config.vocab_size) for _ in range(_PROMPT_LEN))
        sampling = SamplingParams(temperature=1.0, seed=sent, max_tokens=num_steps + 64, ignore_eos=True)
        engine.add(EngineRequest((0, sent), str(sent), prompt, sampling, grammar=next(grammars[row])))
        row_of[0, sent] = row
        sent += 1

    for row in range(len(grammars)):
        send(row)
    begun: set[tuple[int, int]] = set()
    wall: list[float] = []
    cpu: list[float] = []
    tokens = ended_invalid = 0
    is_full = False
    while len(wall) < num_steps:
        if engine.only_awaits_grammars:
            time.sleep(1e-3)
        started, computed = time.perf_counter(), time.thread_time()
        result = engine.step()
        computed, took = time.thread_time() - computed, time.perf_counter() - started
        if result.error is not None:
            raise result.error
        begun.update(output.key for output in result.tokens)
        is_full = is_full or len(begun) >= 0.75 * len(grammars)
        if is_full:
            wall.append(took * 1e3)
            cpu.append(computed * 1e3)
            tokens += sum(len(output.token_ids) for output in result.tokens)
        for finished in result.finished:
            ended_invalid += bool(finished.message)
            send(row_of.pop(finished.key))
    for key in row_of:
        engine.abort(key)
    while engine.has_unfinished():
        engine.step()
    return Steps(wall, cpu, tokens, ended_invalid)


def loads(rows: int) -> dict[str, Callable[[], list[Iterator[str]]]]:
    """Return the grammars of each row's requests, by load."""
    hostile = list(HOSTILE.values())

    def free(count: int) -> list[Iterator[str]]:
        return [repeat("") for _ in range(count)]

    return {
        "free": lambda: free(rows),
        "json": lambda: [repeat(json_grammar(JSON_SCHEMA)) for _ in range(rows)],
        "hostile": lambda: [
            *(cycle(hostile[row % len(hostile) :] + hostile[: row % len(hostile)]) for row in range(rows // 4)),
            *free(rows - rows // 4),
        ],
    }


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
    found: dict[str, list[Steps]] = {name: [] for name in loads(rows)}
    for number in range(rounds + 1):
        for name, grammars in loads(rows).items():
            measured = measure(engine, grammars(), steps)
            if number:  # the first round warms up
                found[name].append(measured)
    print(
        "| load | step p50, ms | p99, ms | CPU of the step's thread, ms | tokens/s | ended INVALID |\n"
        "|---|---|---|---|---|---|"
    )
    for name, several in found.items():
        free = found["free"]

        def cell(figure: Callable[[Steps], float], several: list[Steps] = several, free: list[Steps] = free) -> str:
            ratio = statistics.median(figure(a) / figure(b) for a, b in zip(several, free, strict=True))
            return f"{statistics.median(map(figure, several)):.2f} ({ratio:.2f})"

        figures: list[Callable[[Steps], float]] = [
            lambda measured: measured.percentile(0.5),
            lambda measured: measured.percentile(0.99),
            lambda measured: statistics.mean(measured.cpu),
            lambda measured: measured.tokens_per_second,
        ]
        ended = sum(measured.ended_invalid for measured in several)
        print(f"| {name} | {' | '.join(map(cell, figures))} | {ended} |", flush=True)
    os._exit(0)  # as the engine's own process ends


if __name__ == "__main__":
    typer.run(main)
