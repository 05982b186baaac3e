"""A neighbour's counts since it was last asked."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

_MOST_SAMPLES = 200_000


class Tally:
    """Counts and durations; durations in seconds, reported as milliseconds."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self._durations: dict[str, list[float]] = defaultdict(list)

    def observe(self, name: str, seconds: float) -> None:
        """One duration; of very many, the first ones."""
        values = self._durations[name]
        if len(values) < _MOST_SAMPLES:
            values.append(seconds)

    def take(self) -> dict[str, Any]:
        """Report and begin anew."""
        report: dict[str, Any] = dict(self.counts)
        for name, values in self._durations.items():
            p50, p99 = np.percentile(values, (50, 99))
            report[f"{name}_ms"] = {"p50": 1e3 * float(p50), "p99": 1e3 * float(p99), "count": len(values)}
        self.counts.clear()
        self._durations.clear()
        return report
