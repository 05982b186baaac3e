"""What a part of the run is, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # the process that starts workers does without torch
    from bench.gpu.device import Device

State = Literal["passed", "failed", "skipped"]
DEVICE_LOST = 3  # exit code of a worker: the parts that it has not run need a new process


class UnavailableError(Exception):
    """A part cannot run on this machine, which is nobody's mistake; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something that has to hold. `passed` is None where a dry run cannot tell."""

    name: str
    passed: bool | None
    detail: str = ""


@dataclass(slots=True)
class Findings:
    """What a part has found so far; kept when the part fails half way."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    """What later parts use, as plain JSON: the measured ceilings."""

    def row(self, **values: Any) -> None:
        """Add a row of the part's table; all rows of one part have the same columns."""
        self.rows.append(values)

    def check(self, name: str, passed: bool | None, detail: str = "") -> None:
        """Note whether something held."""
        self.checks.append(Check(name, passed, detail))

    def note(self, text: str) -> None:
        """Say something that is neither figure nor check."""
        self.notes.append(text)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a part is given: the device, the time that is left, and what earlier parts shared."""

    device: Device
    deadline: float
    """By `time.monotonic`."""
    shared: Mapping[str, Any]
    options: Mapping[str, Any]
    """Of this run of the part, for a part that starts processes of its own."""

    def seconds_left(self) -> float:
        """Return seconds until the budget of the whole run is spent."""
        return self.deadline - time.monotonic()


class Part(Protocol):
    """One subject of the run. An instance is made in the process that runs it, without arguments."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Measure and check.

        Raises:
            UnavailableError: it cannot be done on this machine.
        """


@dataclass(frozen=True, slots=True)
class PartSpec:
    """How a part is found and what it takes; known without importing it.

    `seconds` is what it takes on an H200, cold. `timeout` is when it is given up.
    """

    name: str
    module: str
    attribute: str
    seconds: float
    timeout: float
    title: str


@dataclass(slots=True)
class PartResult:
    """How a part ended."""

    name: str
    state: State
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(cls, name: str, found: Findings, seconds: float, error: str | None = None) -> PartResult:
        """Judge what a part found."""
        failed = error is not None or any(check.passed is False for check in found.checks)
        state: State = "failed" if failed else "passed"
        return cls(name, state, round(seconds, 2), found.rows, found.checks, found.notes, found.shared, error)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PartResult:
        """Undo `to_json`."""
        return cls(**{**values, "checks": [Check(**check) for check in values["checks"]]})

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)
