"""One window of credits, divided among the links of several schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """One link's claim to a window of credits, in requests or prompt tokens.

    Attributes:
        held: Credits that its requests hold now.
        wanted: Further credits that it asked for in its last message.
        weight: Its weight when the window is too small for all: its number of waiting tenants.
    """

    held: int
    wanted: int
    weight: int = 1


def divide(window: int, claims: Sequence[Claim]) -> list[int]:
    """Divide a window of credits among links. Each gets at least the credits that it holds, and at least 1.

    Free credits first go to the links that want some, so that the holdings per weight become equal and no link gets
    more than it wants. Those left are then divided equally among all links, for their next requests. The total exceeds
    the window only where more is held already, or by the 1 of each link.

    Args:
        window: Most credits that may be held in total.
        claims: One per link.

    Returns:
        The credits that each link may hold, in the order of `claims`.
    """
    held = [claim.held for claim in claims]
    if len(claims) == 1:
        return [max(window, *held)]
    free = window - sum(held)
    wanted = [claim.held + claim.wanted for claim in claims]
    shares = _raise_lowest(held, wanted, [claim.weight for claim in claims], free)
    free -= sum(shares) - sum(held)
    most = [max(share, window) for share in shares]
    return [max(1, share) for share in _raise_lowest(shares, most, [1] * len(claims), free)]


def _raise_lowest(amounts: Sequence[int], limits: Sequence[int], weights: Sequence[int], free: int) -> list[int]:
    """Raise the amounts that are lowest relative to their weights to a common level, within `free` and the limits."""
    if free <= 0:
        return list(amounts)
    places = range(len(amounts))
    # Between two neighbouring bounds the set of amounts that rise stays the same.
    bounds = sorted({value / weights[i] for i in places for value in (amounts[i], limits[i])})
    level, left = 0.0, float(free)
    for bound in bounds:
        rate = sum(weights[i] for i in places if amounts[i] <= level * weights[i] < limits[i])
        if rate * (bound - level) >= left:
            level += left / rate
            break
        left -= rate * (bound - level)
        level = bound
    raised = [min(max(amounts[i], int(level * weights[i] + 1e-9)), limits[i]) for i in places]
    # Rounding down has left less than 1 per link.
    spare = free - sum(raised) + sum(amounts)
    for i in sorted(places, key=lambda i: raised[i] / weights[i]):
        if spare > 0 and raised[i] < limits[i]:
            raised[i] += 1
            spare -= 1
    return raised
