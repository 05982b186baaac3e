"""A part of the run, and its findings."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # the process that starts workers does without torch
    from bench.gpu.device import Device
    from scalellm.kernels.spec.case import Case
    from scalellm.kernels.spec.draws import DrawCase

State = Literal["passed", "failed", "skipped"]
Kind = Literal["begin", "row", "check", "note", "shared", "end"]
Sink = Callable[[Kind, dict[str, Any]], None]
_GIB = 2**30
DEVICE_LOST = 3  # exit code of a worker: the parts that it has not run need a new process


class UnavailableError(Exception):
    """A part cannot run on this machine, which is nobody's mistake; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something that has to hold. `passed` is None where a dry run cannot tell. A `target` is of speed."""

    name: str
    passed: bool | None
    detail: str = ""
    target: bool = False


class Findings:
    """Takes what a part finds, and hands each piece on at once: what comes later may end the process, or the run."""

    def __init__(self, sink: Sink = lambda kind, value: None) -> None:
        self._sink = sink
        self.num_rows = 0
        self.failed = False

    def row(self, **values: Any) -> None:
        """Add a row of the part's table; all rows of one part have the same columns."""
        self.num_rows += 1
        self._sink("row", values)

    def check(self, name: str, passed: bool | None, detail: str = "", *, target: bool = False) -> None:
        """Note whether something held."""
        self.failed |= passed is False
        self._sink("check", asdict(Check(name, passed, detail, target)))

    def note(self, text: str) -> None:
        """Say something that is neither figure nor check."""
        self._sink("note", {"text": text})

    def share(self, **values: Any) -> None:
        """Leave plain JSON for later parts: the measured ceilings."""
        self._sink("shared", values)

    @contextmanager
    def attempt(self, name: str, device: Device) -> Iterator[None]:
        """Try one case, model or workload: whatever it raises is a failed check of this name, and the part goes on.

        Triton's OutOfResources and CompilationError are no RuntimeErrors, so every kind of exception is meant.

        Raises:
            RuntimeError: the device is lost, which ends the part.
        """
        try:
            yield
        except UnavailableError as error:
            self.note(f"{name}: left out: {error}")
        except Exception as error:
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {error}"[:500])
        device.synchronize()
        device.release()


@dataclass(frozen=True, slots=True)
class Bench:
    """The arguments of a part: the device, the time that is left, and results of earlier parts."""

    device: Device
    deadline: float
    """By `time.monotonic`: the end of this part's share of the budget."""
    shared: Mapping[str, Any]
    options: Mapping[str, Any]
    """Options of the part's specification, and of this run of it where a part starts processes of its own."""

    def seconds_left(self) -> float:
        """Return seconds until the part's share of the budget is spent."""
        return self.deadline - time.monotonic()

    def obstacle(self, case: Case | DrawCase) -> str:
        """Return why a case is left out: what the device lacks, or the option `most_gibibytes`; empty if it is not."""
        if self.device.capability.sm < case.min_sm:
            return f"needs compute capability {case.min_sm / 10}"
        if case.gibibytes > self.options.get("most_gibibytes", case.gibibytes):
            return f"takes {case.gibibytes:.1f} GiB, which only a full run does"
        if self.device.free_bytes() < case.gibibytes * _GIB:
            return f"needs {case.gibibytes:.1f} GiB"
        return ""


class Part(Protocol):
    """One subject of the run. An instance is made in the process that runs it, without arguments."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Measure and check.

        Raises:
            UnavailableError: it cannot be done on this machine.
        """


@dataclass(frozen=True, slots=True)
class PartSpec:
    """The name and cost of a part; known without importing it.

    `seconds` is what it takes on an H200, cold: the budget is divided in proportion to it. `timeout` is when it is
    given up. `options` say which of a part's cases are meant.
    """

    name: str
    module: str
    attribute: str
    seconds: float
    timeout: float
    title: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"options": dict(self.options)}


@dataclass(slots=True)
class PartResult:
    """A part's findings: all that it found until it ended, or was ended."""

    name: str
    state: State = "failed"
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    error: str | None = "did not end"

    def take(self, kind: Kind, value: dict[str, Any]) -> None:
        """Add what the part found, or how it ended."""
        if kind == "row":
            self.rows.append(value)
        elif kind == "check":
            self.checks.append(Check(**value))
        elif kind == "note":
            self.notes.append(value["text"])
        elif kind == "shared":
            self.shared |= value
        elif kind == "end":
            self.state, self.seconds, self.error = value["state"], value["seconds"], value["error"]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)
