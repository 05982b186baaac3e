"""Figures of `scalellm top`, computed from two scrapes of each service's metrics.

A figure that cannot be told (its family is missing, or what was sent is no finite number) is NaN.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import repeat
from typing import TYPE_CHECKING
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

if TYPE_CHECKING:
    from prometheus_client import Metric

_TIMEOUT = 1.5
_CHARSET = "utf-8"
_MAX_BYTES = 4 * 2**20

# The names under which the samples of a family stand.
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Scrape:
    """One service's answer; without samples where it gave none."""

    address: str
    at: float
    samples: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    @property
    def service(self) -> str:
        """tokenizer, scheduler or executor; empty when it does not answer, or does not say."""
        return next((dict(labels).get("service", "") for labels in self.samples.get("scalellm_build_info", {})), "")

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric over its series with these labels."""
        if name not in self.samples:
            return math.nan
        wanted = set(labels.items())
        found = sum(value for key, value in self.samples[name].items() if wanted <= set(key))
        return found if math.isfinite(found) else math.nan


def scrape(addresses: Sequence[str], tls: ssl.SSLContext | None = None) -> list[Scrape]:
    """Ask all endpoints (host:port) at once, over TLS if that is given."""
    with ThreadPoolExecutor(max_workers=len(addresses)) as pool:
        return list(pool.map(_scrape, addresses, repeat(tls)))


def _scrape(address: str, tls: ssl.SSLContext | None) -> Scrape:
    # Services are asked as they stand: a web proxy does not reach them.
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=tls))
    scheme = "http" if tls is None else "https"
    at = time.monotonic()
    try:
        with opener.open(f"{scheme}://{address}/metrics", timeout=_TIMEOUT) as answer:
            body = answer.read(_MAX_BYTES + 1)
        if len(body) > _MAX_BYTES:
            return Scrape(address, at)
        return Scrape(address, at, read_samples(body.decode(_CHARSET)))
    except (OSError, HTTPException, ValueError):
        return Scrape(address, at)


def read_samples(exposition: str) -> dict[str, dict[Labels, float]]:
    """The samples by name and labels; an empty family is there, too. Raises ValueError for what is no exposition."""
    from prometheus_client.parser import text_string_to_metric_families  # only here: importing it takes a while

    samples: dict[str, dict[Labels, float]] = {}
    try:
        family: Metric
        for family in text_string_to_metric_families(exposition):
            for suffix in _SUFFIXES.get(family.type, ("",)):
                samples.setdefault(f"{family.name}{suffix}", {})
            for sample in family.samples:
                samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    except Exception as error:  # whatever the parser stumbles over
        raise ValueError("not a metrics exposition") from error
    return samples


class Window:
    """The difference between two scrapes of the same services.

    Args:
        old: The earlier ones.
        new: The later ones.
    """

    def __init__(self, old: Sequence[Scrape], new: Sequence[Scrape]) -> None:
        before = {scrape.address: scrape for scrape in old}
        self.pairs = [(before.get(scrape.address, scrape), scrape) for scrape in new]

    def of(self, service: str) -> list[tuple[Scrape, Scrape]]:
        """The pairs of one kind of service."""
        return [pair for pair in self.pairs if pair[1].service == service]

    def labels(self, name: str, label: str) -> list[str]:
        """The values that a label of a metric has anywhere, in order."""
        found = {dict(key).get(label) for _, new in self.pairs for key in new.samples.get(name, {})}
        return sorted(value for value in found if value is not None)

    def gauge(self, name: str, **labels: str) -> float:
        """A gauge now, summed over all services."""
        return _sum(new.total(name, **labels) for _, new in self.pairs)

    def rate(self, name: str, **labels: str) -> float:
        """A counter's increase per second, summed over all services."""
        return _sum(rate(old, new, name, **labels) for old, new in self.pairs)

    def quantile(self, histogram: str, q: float) -> float:
        """A quantile of what was observed meanwhile; NaN when nothing was."""
        return quantile(self.pairs, histogram, q)


def increase(old: Scrape, new: Scrape, name: str, **labels: str) -> float:
    """A counter's increase; one that began anew counts from 0."""
    before, now = old.total(name, **labels), new.total(name, **labels)
    if not old.samples:
        return 0.0 if name in new.samples else math.nan
    return now - before if now >= before else now


def rate(old: Scrape, new: Scrape, name: str, **labels: str) -> float:
    """A counter's increase per second."""
    return increase(old, new, name, **labels) / max(1e-3, new.at - old.at)


def quantile(pairs: Sequence[tuple[Scrape, Scrape]], histogram: str, q: float) -> float:
    """A quantile of the observations between the scrapes of each pair, linear within its bucket as in Prometheus."""
    name = f"{histogram}_bucket"
    bounds = {dict(labels).get("le", "") for _, new in pairs for labels in new.samples.get(name, {})}
    counts = sorted(
        (bound, _sum(increase(old, new, name, le=le) for old, new in pairs))
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
    """The sum of those that are known; NaN when none is."""
    known = [figure for figure in figures if not math.isnan(figure)]
    return sum(known) if known else math.nan


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
