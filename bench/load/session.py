"""One call of the program: meets the server, warms it up, runs the steps, prints and writes what came of them."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.load.driver import Driver
from bench.load.figures import Slo
from bench.load.page import page
from bench.load.records import RequestError
from bench.load.run import Run, run_step
from bench.load.target import Target, UsageError
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Load, Shape

_OPEN_LOOP_S = 30
_WARM_UP_OUTPUT = 4
# A server may compile on its first requests: no deadline of the measurement applies to them.
_WARM_UP_S = 600.0


class Session:
    """The steps against one server, with their progress and their files.

    Args:
        make_target: Called in the event loop that will use it.
        run: Takes in the steps; its header has the options.
        shape: Shape of all steps.
        slo: For goodput.
        output: Prefix of the files' paths; None: no files.
    """

    def __init__(
        self, make_target: Callable[[], Target], run: Run, shape: Shape, slo: Slo | None, output: Path | None
    ) -> None:
        self._make_target = make_target
        self._run = run
        self._shape = shape
        self._slo = slo
        self._output = output

    async def run(
        self, loads: list[Load], words: Vocabulary | None, model: str | None, num_requests: int, warm_up: int
    ) -> None:
        """Run a step per load. Raises RequestError when the server cannot be used, UsageError when it does not fit."""
        target = self._make_target()
        try:
            vocabulary = await self._meet(target, words, model)
            options = self._run.header["options"]
            session_prefix = f"bench-{uuid.uuid4().hex[:8]}"
            driver = Driver(
                target,
                vocabulary,
                session_prefix=session_prefix,
                stream=options["stream"],
                deadline_s=options["deadline_s"],
            )
            if warm_up:
                patient = Driver(target, vocabulary, session_prefix=session_prefix, deadline_s=_WARM_UP_S)
                await self._warm_up(patient, vocabulary, warm_up)
            with _progress() as progress:
                for number, load in enumerate(loads):
                    await self._step(driver, vocabulary, load, f"{options['seed']}/{number}", num_requests, progress)
        finally:
            await target.close()

    async def _meet(self, target: Target, words: Vocabulary | None, model: str | None) -> Vocabulary:
        """Ask the server what it is, and choose the tokens of the prompts."""
        info = await target.info()
        if model is not None and target.takes_token_ids and model != info.model:
            raise UsageError(f"--model: {model} is asked for, the server has {info.model}")
        self._run.header |= {"model": info.model, "server_version": info.version}
        if words is not None:
            return words
        if self._shape.workload == "sessions" or not target.takes_token_ids:
            raise UsageError("--tokenizer: sessions, and prompts for OpenAI's API, are sent as text and need one")
        if not info.vocab_size:
            raise UsageError("--tokenizer: the server does not say how large its vocabulary is")
        return Vocabulary.of_size(info.vocab_size)

    async def _warm_up(self, driver: Driver, vocabulary: Vocabulary, count: int) -> None:
        lengths = {**asdict(self._shape), "cancel_share": 0.0, "think_s": 0.0}
        lengths["output_len"] = min(_WARM_UP_OUTPUT, self._shape.output_len)
        load = Load(concurrency=count)
        step = await run_step(
            driver, Shape(**lengths), load, alphabet=vocabulary.alphabet, num_requests=count, seed="warm-up"
        )
        failed = next((record for record in step.records if record.status == "failed"), None)
        if failed is not None:
            raise RequestError(failed.kind, f"the warm-up failed: {failed.message}")

    async def _step(
        self, driver: Driver, vocabulary: Vocabulary, load: Load, seed: str, num_requests: int, progress: Progress
    ) -> None:
        count = num_requests or max(8, 4 * (load.concurrency or 0), math.ceil(_OPEN_LOOP_S * (load.rate or 0)))
        bar = progress.add_task(f"load {load}", total=count)
        step = await run_step(
            driver,
            self._shape,
            load,
            alphabet=vocabulary.alphabet,
            num_requests=count,
            seed=seed,
            slo=self._slo,
            on_end=lambda record: progress.advance(bar),
        )
        self._run.steps.append(step)
        progress.stop_task(bar)
        print(step.text("Serving Benchmark Result"), flush=True)
        # After every step: what was measured is not lost when a later one is interrupted.
        if self._output is not None:
            self._run.write(self._output)
            self._output.with_name(f"{self._output.name}.html").write_text(page(self._run))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=4)
