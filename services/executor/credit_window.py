"""One window of credits, divided among the links of several schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """One link's claim to a window.

    Attributes:
        held: Part of the window that its requests hold now.
        wanted: Further part that it would take, by its last message.
        weight: Its share of a window that is short, compared with others: its tenants that wait.
    """

    held: int
    wanted: int
    weight: int = 1


def divide(window: int, claims: Sequence[Claim]) -> list[int]:
    """Return what each link may hold of a window, at least what it holds and at least 1.

    What is free goes to those that want something, so that by weight they come to hold alike, and none more than it
    wants; what is left then goes to all alike, for what comes to them next. In all it is no more than the window, or
    what is held if that is more, and 1 for each link.

    Args:
        window: Most that may be held in all.
        claims: One per link.
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
    """Raise the amounts that are lowest for their weight to one level, as far as `free` and the limits allow."""
    if free <= 0:
        return list(amounts)
    places = range(len(amounts))
    # Between two neighbours of these levels, the same amounts rise.
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
    # Less than 1 each was lost by rounding.
    spare = free - sum(raised) + sum(amounts)
    for i in sorted(places, key=lambda i: raised[i] / weights[i]):
        if spare > 0 and raised[i] < limits[i]:
            raised[i] += 1
            spare -= 1
    return raised
