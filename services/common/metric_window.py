"""Figures about the time between two readings of services' metrics.

A figure that is not known (its metric is missing, or a value is not finite) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Metric

# The names under which the samples of a family stand.
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}

Labels = tuple[tuple[str, str], ...]
Samples = Mapping[str, Mapping[Labels, float]]


def samples_of(families: Iterable[Metric]) -> dict[str, dict[Labels, float]]:
    """Return the samples by name and labels. A family without samples has an empty entry."""
    samples: dict[str, dict[Labels, float]] = {}
    for family in families:
        for suffix in _SUFFIXES.get(family.type, ("",)):
            samples.setdefault(f"{family.name}{suffix}", {})
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples


@dataclass(frozen=True, slots=True)
class Scrape:
    """One service's metrics at one time. Without samples if it did not answer.

    Attributes:
        address: Address of the service.
        at: Monotonic seconds.
        samples: By name and labels.
    """

    address: str
    at: float
    samples: Samples = field(default_factory=dict)

    @property
    def service(self) -> str:
        """Kind of the service: tokenizer, scheduler or executor; empty if it is not known."""
        return next((dict(labels).get("service", "") for labels in self.samples.get("scalellm_build_info", {})), "")

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over its series with these labels."""
        if name not in self.samples:
            return math.nan
        wanted = set(labels.items())
        found = sum(value for key, value in self.samples[name].items() if wanted <= set(key))
        return found if math.isfinite(found) else math.nan


class Window:
    """The difference between two scrapes of the same services.

    Args:
        old: The earlier scrapes.
        new: The later scrapes.
    """

    def __init__(self, old: Sequence[Scrape], new: Sequence[Scrape]) -> None:
        before = {scrape.address: scrape for scrape in old}
        self.pairs = [(before.get(scrape.address, scrape), scrape) for scrape in new]

    def of(self, service: str) -> list[tuple[Scrape, Scrape]]:
        """Return the pairs of scrapes of one kind of service."""
        return [pair for pair in self.pairs if pair[1].service == service]

    def labels(self, name: str, label: str) -> list[str]:
        """Return the values of a metric's label over all services, sorted."""
        found = {dict(key).get(label) for _, new in self.pairs for key in new.samples.get(name, {})}
        return sorted(value for value in found if value is not None)

    def gauge(self, name: str, **labels: str) -> float:
        """Return the latest value of a gauge, summed over all services."""
        return _sum(new.total(name, **labels) for _, new in self.pairs)

    def rate(self, name: str, **labels: str) -> float:
        """Return a counter's increase per second, summed over all services."""
        return _sum(rate(old, new, name, **labels) for old, new in self.pairs)

    def quantile(self, histogram: str, q: float, **labels: str) -> float:
        """Return a quantile of the observations in the window; NaN if there were none."""
        return quantile(self.pairs, histogram, q, **labels)


def increase(old: Scrape, new: Scrape, name: str, **labels: str) -> float:
    """Return a counter's increase. If it was reset, it counts from 0."""
    before, now = old.total(name, **labels), new.total(name, **labels)
    if not old.samples:
        return 0.0 if name in new.samples else math.nan
    return now - before if now >= before else now


def rate(old: Scrape, new: Scrape, name: str, **labels: str) -> float:
    """Return a counter's increase per second."""
    return increase(old, new, name, **labels) / max(1e-3, new.at - old.at)


def quantile(pairs: Sequence[tuple[Scrape, Scrape]], histogram: str, q: float, **labels: str) -> float:
    """Return a quantile of the observations between the scrapes of each pair, linear within a bucket as in
    Prometheus.
    """
    name = f"{histogram}_bucket"
    bounds = {dict(labels).get("le", "") for _, new in pairs for labels in new.samples.get(name, {})}
    counts = sorted(
        (bound, _sum(increase(old, new, name, le=le, **labels) for old, new in pairs))
        for le in bounds
        if not math.isnan(bound := _number(le))
    )
    if not counts or not counts[-1][1] > 0:
        return math.nan
    rank = q * counts[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in counts:
        if count >= rank:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / max(count - below, 1e-9)
        lower, below = bound, count
    return lower


def _sum(figures: Iterable[float]) -> float:
    """Return the sum of the known figures; NaN if none is known."""
    known = [figure for figure in figures if not math.isnan(figure)]
    return sum(known) if known else math.nan


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
