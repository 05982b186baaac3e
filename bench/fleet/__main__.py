"""`python -m bench.fleet`: a fleet on virtual time, its calibration, and what follows for policies."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer

from bench.fleet.calibration import calibrate
from bench.fleet.fleet import VOCABULARY, FleetError, FleetPlan, Pool
from bench.fleet.simulation import Faults, Simulated, simulate
from bench.fleet.sweep import header, sweep
from bench.load.trace import read_trace
from bench.load.vocabulary import Vocabulary
from bench.load.workload import Load, Shape, WorkloadName, conversations
from scalellm.services.common.model_store import pull, resolve
from scalellm.services.common.model_store.catalogue import CATALOGUE
from scalellm.services.executor.engine.fake_model_runner import STEP_TIME_PRESETS

app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    executors: Annotated[int, typer.Option(min=1, help="Executors.")] = 8,
    preset: Annotated[
        str, typer.Option(help=f"How long steps take: {', '.join(STEP_TIME_PRESETS)}.")
    ] = "h200-llama-8b",
    load: Annotated[str, typer.Option(help="8: eight requests at once; 20/s: as many a second (Poisson).")] = "20/s",
    requests: Annotated[int, typer.Option(min=1, help="Requests in all; of a trace, at most.")] = 400,
    workload: Annotated[str, typer.Option(help="A workload of bench.load: fixed, chat, shared, sessions.")] = "shared",
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens; the median for chat.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Generated tokens; the median for chat.")] = 64,
    prefix_len: Annotated[int, typer.Option(min=1, help="shared: tokens of the shared prompt.")] = 512,
    trace: Annotated[Path | None, typer.Option(help="A trace in Mooncake's format (JSON lines) instead.")] = None,
    kills: Annotated[int, typer.Option(min=0, help="Executors that die under load.")] = 0,
    drains: Annotated[int, typer.Option(min=0, help="Executors that leave in order under load.")] = 0,
    latency_ms: Annotated[float, typer.Option(min=0, help="Milliseconds of a message from service to service.")] = 0.2,
    seed: Annotated[str, typer.Option(help="Seed of the run, from which everything follows.")] = "0",
    profile: Annotated[bool, typer.Option("--profile", help="Show where the CPU time goes.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small fleets of each kind, each run twice: a test.")] = False,
) -> None:
    """Simulate a fleet: the real scheduler and engines on virtual time."""
    if context.invoked_subcommand is not None:
        return
    if quick:
        _quick()
        return
    try:
        when = Load.parse(load)
        if preset not in STEP_TIME_PRESETS:
            raise ValueError(f"--preset: {preset!r} is none of {', '.join(STEP_TIME_PRESETS)}")
        if workload not in get_args(WorkloadName):
            raise ValueError(f"--workload: {workload!r} is none of {', '.join(get_args(WorkloadName))}")
        pool = Pool(executors, steps=STEP_TIME_PRESETS[preset])
        alphabet = Vocabulary.of_size(VOCABULARY).alphabet
        times = None
        if trace is not None:
            planned, times = read_trace(trace, alphabet, max_len=pool.max_model_len, max_requests=requests)
        else:
            shape = Shape(
                workload,  # type: ignore[arg-type]
                input_len,
                output_len,
                pool.max_model_len,
                prefix_len,
            )
            planned = conversations(shape, alphabet, requests, seed)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    plan = FleetPlan((pool,), latency=latency_ms / 1e3)
    done = _simulate_or_exit(
        lambda: simulate(plan, planned, when, seed=seed, times=times, faults=Faults(kills, drains))
    )
    profiler.disable()
    print(done.text(f"{executors} executors, {trace.name if trace is not None else when}"))
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def _quick() -> None:
    alphabet = Vocabulary.of_size(VOCABULARY).alphabet
    shape = Shape("shared", 64, 32, prefix_len=512)
    for size, load, count in ((8, "20/s", 40), (8, "16", 32), (64, "50/s", 40)):
        planned = conversations(shape, alphabet, count, "quick")
        job = partial(simulate, FleetPlan((Pool(size),)), planned, Load.parse(load), faults=Faults(1, 1))
        done = [_simulate_or_exit(job) for _ in range(2)]
        if done[0].digest != done[1].digest:
            print(f"two runs of {size} executors at {load} differ: {done[0].digest} and {done[1].digest}")
            raise typer.Exit(1)
        print(done[1].text(f"{size} executors, {load}"))


def _simulate_or_exit(job: Callable[[], Simulated]) -> Simulated:
    try:
        return job()
    except FleetError as error:
        print(f"the simulated line failed: {error}")
        raise typer.Exit(1) from None


@app.command("pools")
def _pools(
    clients: Annotated[str, typer.Option(help="Clients of the closed loops, separated by commas.")] = (
        "1,2,4,8,16,32,64,128,256,512,1024"
    ),
) -> None:
    """Compare one large replica, eight small ones, and both with each policy; prints a table."""
    print(header())
    for count in clients.split(","):
        for point in sweep([int(count)]):
            print(point.row(), flush=True)


@app.command("calibrate")
def _calibrate(
    model: Annotated[str, typer.Option(help="Model whose tokenizer the line has: a name, or a path.")] = (
        "smollm2-135m-instruct"
    ),
    home: Annotated[Path, typer.Option(envvar="SCALELLM_HOME", help="The model store.")] = Path("~/.cache/scalellm"),
    loads: Annotated[str, typer.Option(help="Requests in flight, separated by commas.")] = "4,8,16",
    executors: Annotated[int, typer.Option(min=1, help="Executors.")] = 1,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 1024,
    output_len: Annotated[int, typer.Option(min=2, help="Generated tokens.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all loads; the middle one counts.")] = 5,
) -> None:
    """Run a real line on the fake engine and the simulator on the same requests; exit 1 beyond 10 %.

    On a machine that is busy the line's times are not its own.
    """
    home = home.expanduser()
    if model in CATALOGUE:
        pull(model, home)
    shape = Shape(input_len=input_len, output_len=output_len)
    plan, found = calibrate(resolve(model, home), [int(load) for load in loads.split(",")], shape, executors, rounds)
    base = plan.pools[0].steps.base - STEP_TIME_PRESETS["h200-llama-8b"].base
    print(
        f"measured with one stream: {1e3 * plan.encoding:.3f} ms to encode a request, {1e3 * plan.latency:.3f} ms per "
        f"message, {1e3 * base:.3f} ms more per step"
    )
    for comparison in found:
        print(comparison.text())
    if not all(comparison.is_close for comparison in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
