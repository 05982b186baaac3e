"""Figures from two scrapes."""

from __future__ import annotations

import math

from clients.cli.top_figures import Scrape, increase, quantile, rate


def scrape(at: float, **samples: dict[str, float]) -> Scrape:
    """Samples by name and value of the label `le`, or `` for one without."""
    return Scrape(
        "a:1",
        at,
        {name: {(("le", le),) if le else (): value for le, value in of.items()} for name, of in samples.items()},
    )


def test_a_counter_that_begins_anew_counts_from_zero() -> None:
    old, new = scrape(0.0, x_total={"": 100.0}), scrape(2.0, x_total={"": 130.0})
    assert (increase(old, new, "x_total"), rate(old, new, "x_total")) == (30.0, 15.0)
    assert increase(old, scrape(2.0, x_total={"": 7.0}), "x_total") == 7.0
    assert increase(Scrape("a:1", 0.0), new, "x_total") == 0.0, "what it did before it was first seen is no news"


def test_quantiles_are_those_of_what_happened_in_between() -> None:
    old = scrape(0.0, h_bucket={"0.1": 50.0, "0.2": 50.0, "0.4": 50.0, "+Inf": 50.0})
    new = scrape(1.0, h_bucket={"0.1": 50.0, "0.2": 60.0, "0.4": 70.0, "+Inf": 70.0})
    assert math.isclose(quantile([(old, new)], "h", 0.5), 0.2)
    assert math.isclose(quantile([(old, new)], "h", 0.75), 0.3)
    assert math.isnan(quantile([(old, old)], "h", 0.5))
    beyond = scrape(1.0, h_bucket={"0.1": 50.0, "0.2": 50.0, "0.4": 50.0, "+Inf": 60.0})
    assert quantile([(old, beyond)], "h", 0.5) == 0.4, "beyond the last bound nothing is known"
