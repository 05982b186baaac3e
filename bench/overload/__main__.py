"""`python -m bench.overload`: ten times the load that fits, and one tenant's flood beside another's few requests.

The engine is the fake one with an H200's step times, so that little is needed to fill it; everything else is real. Each
crowd of clients is a process of its own. On a machine with few cores clients and services share them: compare a phase
with its neighbours in the same run. CPU time of each process says what a refusal costs on any machine, however busy.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.overload.clients import Crowd, Outcome, processes, start
from bench.peers.report import machine
from bench.services.processes import Service, Workplace, cpu_seconds
from scalellm import __version__
from scalellm.services.common.api_keys import Role, key_entry, new_key
from scalellm.services.common.model_store import pull, resolve
from scalellm.services.common.model_store.catalogue import CATALOGUE

ROWS = 36
"""Sequences that the engine runs at once."""
QUEUE = 64
"""Requests that may wait in the scheduler."""
_TOKENS = (128, 384)
"""Fewest and most tokens of an answer."""
_BURST_SECONDS = 5.0
"""Seconds after which the calls that all clients began with, in one moment, are answered."""
_FLOODS = {
    "60 streams of 64 tokens": (60, 64, False),
    "60 streams of 1,000 tokens": (60, 1000, False),
    "750 streams of 64 tokens": (750, 64, False),
    "750 streams of 64 tokens, full queue": (750, 64, True),
}
"""Streams, tokens of each, and whether the queue is short."""


@dataclass(frozen=True)
class Line:
    """A line to overload, and a key of each of two tenants."""

    tokenizer: Service
    scheduler: Service
    executor: Service
    keys: tuple[str, str]

    @property
    def address(self) -> str:
        """Address for clients."""
        return self.tokenizer.address

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time since the start of each kind of process."""
        seconds: dict[str, float] = defaultdict(float)
        for service in (self.tokenizer, self.scheduler, self.executor):
            for role, found in service.processes.items():
                seconds[role] += sum(map(cpu_seconds, found))
        return seconds

    def worker_mib(self) -> float:
        """Memory of the tokenizer's workers."""
        return sum(worker.memory_info().rss for worker in self.tokenizer.processes["worker"]) / 2**20


@contextmanager
def _line(model: Path, queue: int) -> Iterator[Line]:
    with Workplace() as place, tempfile.TemporaryDirectory(prefix="scalellm-overload-") as folder:
        keys = new_key(), new_key()
        file = Path(folder) / "keys.toml"
        file.write_text("".join(key_entry(key, f"tenant-{key[-4:]}", Role.USER) for key in keys))
        file.chmod(0o600)
        redis = place.redis()
        engine = ("--engine", "fake", "--fake-preset", "h200-llama-8b", "--max-model-len", "4096")
        limits = ("--num-blocks", "16384", "--max-num-seqs", str(ROWS))
        executor = place.service("executor", "--model", str(model), *engine, *limits)
        queued = ("--max-queued-requests", str(queue))
        scheduler = place.service("scheduler", "--executors", executor.address, "--redis-url", redis.url, *queued)
        flags = ("--scheduler", scheduler.address, "--model", str(model), "--redis-url", redis.url)
        yield Line(place.service("tokenizer", *flags, "--api-keys", str(file)), scheduler, executor, keys)


def _overload(line: Line, seconds: float) -> dict[str, Any]:
    """A full load; ten times as much; and a full load again.

    Ten times as much is, one after the other: ten times the requests a second; ten times the clients, who come back
    when they are told; as many, who come back after a second. A probe of its own sees what a refusal costs.
    """

    phases: dict[str, dict[str, Any]] = {}
    memory = [line.worker_mib()]
    full = Crowd(line.address, line.keys[0], ROWS + 4, _TOKENS, seconds)
    many = replace(full, clients=10 * (ROWS + QUEUE))

    def run(pool: ProcessPoolExecutor, name: str, crowd: Crowd, *, probed: bool = True) -> None:
        began = line.cpu_seconds()
        running = start(pool, crowd)
        probe = start(pool, replace(full, clients=1, after_refusal=0.1, starts_after=1)) if probed else None
        report = running.result()
        phases[name] = _figures(report.outcomes, seconds)
        if probe is not None:
            phases[f"{name}, probe"] = _figures(probe.result().outcomes, seconds)
        spent = {role: after - began[role] for role, after in line.cpu_seconds().items()}
        phases[name]["CPU s"] = {**spent, "clients": report.cpu_s}
        memory.append(line.worker_mib())

    with processes(2) as pool:
        run(pool, "before", full, probed=False)
        overloads = {
            "ten times the requests a second": replace(many, per_second=10 * phases["before"]["admitted per s"]),
            "overload": many,
            "overload, clients come back after a second": replace(many, after_refusal=1.0),
        }
        for name, crowd in overloads.items():
            run(pool, name, crowd)
        run(pool, "after", full, probed=False)
    peak = max(phases["before"]["admitted per s"], phases["after"]["admitted per s"])
    return {
        **phases,
        "admitted share of the peak": {name: phases[name]["admitted per s"] / peak for name in overloads},
        "CPU us per refusal": {name: _cost_of_refusals(phases["before"], phases[name]) for name in overloads},
        "MiB of the workers": memory,
    }


def _beside(line: Line, seconds: float, flood: tuple[int, int] | None) -> dict[str, float]:
    """A tenant with one short request at a time, beside another one's flood."""
    quiet = Crowd(line.address, line.keys[0], 1, (16, 16), seconds, pause=0.2, starts_after=2)
    with processes(2) as pool:
        if flood is not None:
            clients, tokens = flood
            start(pool, Crowd(line.address, line.keys[1], clients, (tokens, tokens), seconds + 4))
        return _figures(start(pool, quiet).result().outcomes, seconds)


def _cost_of_refusals(full: dict[str, Any], overload: dict[str, Any]) -> dict[str, float]:
    """CPU microseconds of each kind of process: what overload took beyond what its admitted requests take without."""
    refused = overload["codes"].get("RESOURCE_EXHAUSTED", 0)
    share = overload["admitted per s"] / max(full["admitted per s"], 1e-9)
    return {
        role: round(1e6 * (seconds - share * full["CPU s"][role]) / max(1, refused))
        for role, seconds in overload["CPU s"].items()
    }


def _figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    served = [outcome for outcome in outcomes if outcome.code == "OK"]
    refused = [outcome for outcome in outcomes if outcome.code == "RESOURCE_EXHAUSTED"]
    began = min((outcome.started_at for outcome in outcomes), default=0.0)
    later = [outcome for outcome in refused if outcome.started_at > began + _BURST_SECONDS]
    return {
        "codes": dict(Counter(outcome.code for outcome in outcomes)),
        "admitted per s": len(served) / seconds,
        "ttft p50 ms": _quantile([outcome.ttft for outcome in served], 0.5),
        "ttft p99 ms": _quantile([outcome.ttft for outcome in served], 0.99),
        "refusal p50 ms": _quantile([outcome.seconds for outcome in refused], 0.5),
        "refusal p99 ms": _quantile([outcome.seconds for outcome in refused], 0.99),
        "refusal p99 ms after the first burst": _quantile([outcome.seconds for outcome in later], 0.99),
        "refusals without RetryInfo": sum(outcome.told is None for outcome in refused),
        "told to wait p50 ms": _quantile([outcome.told for outcome in refused if outcome.told is not None], 0.5),
    }


def _quantile(seconds: Sequence[float], share: float) -> float | None:
    """In milliseconds; None of nothing."""
    return round(1e3 * sorted(seconds)[int(share * (len(seconds) - 1))], 2) if seconds else None


def main(
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of each phase.")] = 60.0,
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used.")] = "smollm2-135m-instruct",
    home: Annotated[Path, typer.Option(envvar="SCALELLM_HOME", help="The model store.")] = Path("~/.cache/scalellm"),
    output: Annotated[Path | None, typer.Option(help="Write all figures to this JSON file.")] = None,
) -> None:
    """Overload a line, then let one tenant flood it beside another."""
    home = home.expanduser()
    if model in CATALOGUE:
        pull(model, home)
    path = resolve(model, home)
    found: dict[str, Any] = {**machine(), "scalellm": __version__}
    with _line(path, QUEUE) as line:
        found["overload"] = _overload(line, seconds)
    _show("overload", found["overload"])
    found["beside"] = {}
    for name, (clients, tokens, is_short) in {"alone": (0, 0, False), **_FLOODS}.items():
        with _line(path, QUEUE if is_short else 4096) as line:
            found["beside"][name] = _beside(line, seconds, (clients, tokens) if clients else None)
        _show(f"a quiet tenant, {name}", found["beside"][name])
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n")


def _show(name: str, figures: dict[str, Any]) -> None:
    print(name)
    for key, value in figures.items():
        print(f"  {key}: {value}")


if __name__ == "__main__":
    typer.run(main)
