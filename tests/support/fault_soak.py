"""Hours of everything mixed: streams of every kind one after the other, and a fault now and then."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import mean

import psutil

from fault_injectors import Scene
from fault_line import FaultLine
from fault_promises import FAULTS, Fault
from fault_streams import NoFirstTurnError, Stream
from fault_trials import Trials, unpromised

_SAMPLE_SECONDS = 2.0
_AT_ONCE = 24
_HEALING = 5.0
"""Seconds in which services notice that Redis is back; they look every second, and wait for a second."""

_LONG_ENOUGH = 300.0
"""Seconds of life after which a process shows whether it grows. Faults end most processes within 15 minutes."""

_GROWTH = 1.1
_MARGINS = {"MiB": 12.0, "open files": 16.0, "threads": 4.0}
"""By how much a process may have grown over the last three quarters of its life: allocators breathe, Redis is asked on
as many connections as there are calls at once, and pools of threads grow on demand."""


@dataclass(frozen=True)
class _Sample:
    """Resources that a process held at one moment, by the names of _MARGINS."""

    at: float
    values: Mapping[str, float]

    @classmethod
    def of(cls, process: psutil.Process) -> _Sample:
        """Raises psutil.Error."""
        mib = process.memory_info().rss / 2**20
        values = {"MiB": mib, "open files": process.num_fds(), "threads": process.num_threads()}
        return cls(time.monotonic(), values)


@dataclass
class Soak:
    """One run.

    Attributes:
        seconds: Seconds during which streams are started.
        pause: Seconds between two faults, on average.
        counts: Streams by status, and faults.
        wrong: Descriptions of everything that was wrong.
    """

    line: FaultLine
    trials: Trials
    seconds: float
    pause: float
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _faults: list[tuple[float, float, Fault]] = field(default_factory=list)
    _samples: dict[tuple[str, int, float], list[_Sample]] = field(default_factory=lambda: defaultdict(list))

    async def run(self) -> None:
        """To its end. What is wrong is in `wrong`."""
        await self.trials.prepare()
        end = time.monotonic() + self.seconds
        watching = asyncio.create_task(self._watch())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._break(end))
            for number in range(_AT_ONCE):
                tasks.create_task(self._ask(number, end))
        watching.cancel()
        await self.line.wait_linked()
        await self.line.rest()
        self.wrong += self._growth()

    async def _ask(self, number: int, end: float) -> None:
        rng = random.Random(f"asker {self.rng.random()} {number}")
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                stream = await self.trials.run_one(rng)
            except NoFirstTurnError:
                continue  # as under a fault; the next stream is another one
            except AssertionError as error:
                self.wrong.append(str(error))
                continue
            self._judge(stream, began)

    def _judge(self, stream: Stream, began: float) -> None:
        self.counts[f"{stream.codes[0].name}"] += 1
        self.counts["resumed"] += stream.was_resumed
        met = [fault for start, stop, fault in self._faults if start <= stream.ended_at and began <= stop]
        problems = self.trials.differences(stream)
        verdicts = [unpromised(fault, stream) for fault in met] or [unpromised(_NONE, stream)]
        if all(verdicts):
            problems += verdicts[0]
        names = [name for name, fault in FAULTS.items() if fault in met]
        self.wrong += [f"{problem} (beside {', '.join(names) or 'no fault'})" for problem in problems]

    async def _break(self, end: float) -> None:
        can_fill = self.line.redis.can_fill
        names = [n for n, fault in FAULTS.items() if (can_fill or not fault.needs_disk) and not fault.on_cable]
        while True:
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * self.pause)
            if time.monotonic() > end:
                return
            name = self.rng.choice(names)
            place = len(self._faults)
            self._faults.append((time.monotonic(), float("inf"), FAULTS[name]))
            await FAULTS[name].inject(Scene(self.line, 3, self.rng))
            await self.line.wait_linked()
            healing = _HEALING if FAULTS[name].unsaved else 0.0
            self._faults[place] = (self._faults[place][0], time.monotonic() + healing, FAULTS[name])
            self.counts["faults"] += 1

    async def _watch(self) -> None:
        while True:
            for member in self.line.members:
                with suppress(psutil.Error):
                    for process in await asyncio.to_thread(member.family):
                        with suppress(psutil.Error):
                            key = (member.name, process.pid, process.create_time())
                            self._samples[key].append(_Sample.of(process))
            await asyncio.sleep(_SAMPLE_SECONDS)

    def _growth(self) -> list[str]:
        """Processes that went on growing. Those that lived too short to tell are left out."""
        found = []
        for (name, pid, _), samples in self._samples.items():
            first, last = samples[0].at, samples[-1].at
            if last - first < min(_LONG_ENOUGH, self.seconds / 4):
                continue
            second = [sample for sample in samples if 0.25 <= (sample.at - first) / (last - first) <= 0.5]
            fourth = [sample for sample in samples if (sample.at - first) / (last - first) >= 0.75]
            self.counts["processes watched"] += 1
            for what, margin in _MARGINS.items():
                before, after = (mean(sample.values[what] for sample in part) for part in (second, fourth))
                if after > before * _GROWTH + margin:
                    found.append(f"process {pid} of {name} grew from {before:.0f} to {after:.0f} {what}")
        return found


async def _nothing(_: Scene) -> None:
    """No fault."""


_NONE = Fault(_nothing)
