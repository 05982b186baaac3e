"""A run: its steps, what they were made with, and the files that keep them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.load.driver import Driver
from bench.load.figures import Slo, summarise
from bench.load.meter import GeneratorUse
from bench.load.records import RequestRecord
from bench.load.text import step_text
from bench.load.workload import Load, Shape, conversations, digest

SCHEMA = 1
_LAG_SHARE = 0.1


@dataclass(frozen=True)
class Step:
    """One load, run.

    Attributes:
        load: As `Load` writes it.
        prompts: Digest of what was to be sent.
        not_sent: See StepRun.
        figures: See `summarise`.
        generator: The generator's use of the machine; None where nothing was sent anywhere.
        records: One per request.
    """

    load: str
    prompts: str
    not_sent: int
    figures: dict[str, Any]
    generator: GeneratorUse | None
    records: list[RequestRecord]

    def warnings(self) -> list[str]:
        """The reasons why the figures may not mean what they seem to."""
        found = self.generator.warnings() if self.generator is not None else []
        if self.not_sent:
            found.append(f"{self.not_sent} turns of sessions were not sent: an earlier turn did not end well")
        failed = self.figures["failed"]
        if failed:
            first = next(record for record in self.records if record.status == "failed")
            found.append(f"{failed} requests failed, the first with {first.kind}: {first.message}")
        lag, e2e = self.figures["send_lag_ms"], self.figures["e2e_ms"]
        if lag and e2e and lag["p99"] > _LAG_SHARE * e2e["p50"]:
            found.append(f"requests were sent up to {lag['p99']:.0f} ms (p99) after they were due")
        return found

    def text(self, title: str) -> str:
        """For people."""
        return step_text(f"{title}, {self.load}", self.figures, self.warnings())


@dataclass
class Run:
    """All steps against one target.

    Attributes:
        header: Target, model, options, versions, machine: plain values.
        steps: In order.
    """

    header: dict[str, Any]
    steps: list[Step] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return all but the single requests."""
        steps = [
            {
                "load": step.load,
                "prompts": step.prompts,
                "not_sent": step.not_sent,
                "figures": step.figures,
                "generator": None if step.generator is None else asdict(step.generator),
                "warnings": step.warnings(),
            }
            for step in self.steps
        ]
        return {"schema": SCHEMA, **self.header, "steps": steps}

    def write(self, prefix: Path) -> list[Path]:
        """Write PREFIX.json, and PREFIX.requests.jsonl with one line per request. Returns the paths."""
        paths = [prefix.with_name(f"{prefix.name}{suffix}") for suffix in (".json", ".requests.jsonl")]
        paths[0].write_text(json.dumps(self.as_json(), indent=2) + "\n")
        with paths[1].open("w") as file:
            for step in self.steps:
                for record in step.records:
                    file.write(json.dumps({"load": step.load, **record.as_json()}, separators=(",", ":")) + "\n")
        return paths


async def run_step(
    driver: Driver,
    shape: Shape,
    load: Load,
    *,
    alphabet: Sequence[int],
    num_requests: int,
    seed: str,
    slo: Slo | None = None,
    on_end: Callable[[RequestRecord], None] = lambda record: None,
) -> Step:
    """Send `num_requests` requests of this shape under this load, and sum up."""
    planned = conversations(shape, alphabet, num_requests, seed)
    done = await driver.run(planned, load, seed, on_end)
    figures = summarise(done.records, slo)
    return Step(str(load), digest(planned), done.not_sent, figures, done.generator, done.records)


def read_run(path: Path) -> dict[str, Any]:
    """Read the file that `Run.write` wrote to PREFIX.json. ValueError names the file and the error in it."""
    try:
        run: dict[str, Any] = json.loads(path.read_text())
        schema = run["schema"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no run of bench.load: {error}") from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this program reads {SCHEMA}")
    return run
