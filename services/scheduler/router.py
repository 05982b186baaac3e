"""Chooses the executor of a request: filter, score, pick."""

from __future__ import annotations

import enum
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalellm.services.scheduler.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from scalellm.services.scheduler.replica_link import ReplicaLink

# Cost of one running sequence for a new request, in prefill tokens, since it takes a row of each decode step. A rough
# weight that spreads equal requests evenly; a cached prefix of a few blocks outweighs a handful of sequences.
_TOKENS_PER_RUNNING = 16

_FEW = 16
"""Most candidates that are compared one by one. For more, the order of all executors by load is followed."""


class Verdict(enum.Enum):
    """The reason why no executor was picked."""

    NO_CREDIT = enum.auto()
    """The executors that could run the request are out of credits, or not connected."""
    WAIT_FOR_SESSION = enum.auto()
    """Another executor would take the request, but its session's executor is only out of credits."""
    REFUSED_BY_ALL = enum.auto()
    """All ready executors have refused the request."""


@dataclass(eq=False, slots=True)
class _Entry:
    """An executor that is ready.

    Attributes:
        replica: The executor.
        instance_id: Its incarnation.
        place: Its place in the prefix index.
        bit: The same as a mask.
        rank: Its element in the order by load; None while it has no credit.
    """

    replica: ReplicaLink
    instance_id: str
    place: int
    bit: int
    rank: _Rank | None = None


_Rank = tuple[int, int, str, _Entry]
"""Load in prefill tokens, requests, address, executor. Addresses differ, so no two executors are ever compared."""

_Choice = tuple[int, int, str, _Entry]
"""The same with the cost of one request in place of the load."""


class Router:
    """Picks the executor on which a request's first token should come soonest.

    A session stays on the executor that ran it last while that one is ready: nearly all of its prompt is cached there.
    When that executor is out of credits the request waits for it a short, bounded time (credits come back with each
    step) and then moves like any other request, because a cached prefix is worth the time of computing it and no more.

    Other requests go where fewest tokens have to be computed before and for their first token: what waits there, plus
    the part of the prompt that is probably not cached there, plus a share for running sequences and for cache blocks
    that would have to be taken from others. A suspect executor (a hanging engine behind a live front looks idle, which
    would attract everything) is the last choice.

    The cost of a choice hardly grows with the number of executors. Filters are masks with one bit per executor. The
    executors that take requests are kept in the order of their load, which is followed only until even an executor
    that had no other cost could not win.

    Args:
        prefixes: Index of the executors that have prompt prefixes cached.
    """

    def __init__(self, prefixes: PrefixIndex) -> None:
        self._prefixes = prefixes
        self._entries: dict[str, _Entry] = {}  # by address
        self._by_instance: dict[str, _Entry] = {}
        self._at_place: dict[int, _Entry] = {}
        self._order: list[_Rank] = []
        self._ready = self._takes = self._suspect = self._knows_grammars = 0  # masks
        self._lengths: dict[int, int] = {}  # masks of those with this max_model_len
        self._pools: dict[int, int] = {}  # masks of those with this tensor_parallel

    def has_credit(self) -> bool:
        """True if some executor takes another request now."""
        return bool(self._takes)

    @property
    def takes_grammars(self) -> bool:
        """True if some executor takes grammars."""
        return bool(self._knows_grammars)

    @property
    def num_without_grammars(self) -> int:
        """Number of executors that take no grammars."""
        return (self._ready & ~self._knows_grammars).bit_count()

    # Executors that join, leave and change.

    def join(self, replica: ReplicaLink) -> None:
        """Add an executor that became ready."""
        place = self._prefixes.join(replica.instance_id)
        entry = _Entry(replica, replica.instance_id, place, 1 << place)
        self._entries[replica.address] = self._by_instance[entry.instance_id] = self._at_place[place] = entry
        self._ready |= entry.bit
        if replica.takes_grammars:
            self._knows_grammars |= entry.bit
        self._lengths[replica.max_model_len] = self._lengths.get(replica.max_model_len, 0) | entry.bit
        self._pools[replica.tensor_parallel] = self._pools.get(replica.tensor_parallel, 0) | entry.bit
        self.update(replica)

    def leave(self, replica: ReplicaLink) -> None:
        """Remove an executor that is no longer ready."""
        entry = self._entries.pop(replica.address)
        del self._by_instance[entry.instance_id], self._at_place[entry.place]
        self._prefixes.leave(entry.instance_id)
        self._set_rank(entry, None)
        self._ready &= ~entry.bit
        self._suspect &= ~entry.bit
        self._knows_grammars &= ~entry.bit
        self._lengths = _without(self._lengths, entry.bit)
        self._pools = _without(self._pools, entry.bit)

    def update(self, replica: ReplicaLink) -> None:
        """Update the order and the masks after an executor's load, credits or suspicion of being dead changed."""
        entry = self._entries.get(replica.address)
        if entry is None:
            return
        rank: _Rank | None = None
        if replica.has_credit:
            running = replica.num_running
            load = replica.pending_prefill_tokens + _TOKENS_PER_RUNNING * running
            rank = (load, running, replica.address, entry)
        if rank != entry.rank:
            self._set_rank(entry, rank)
        if replica.is_suspect != bool(self._suspect & entry.bit):
            self._suspect ^= entry.bit

    def _set_rank(self, entry: _Entry, rank: _Rank | None) -> None:
        if entry.rank is not None:
            del self._order[bisect_left(self._order, entry.rank)]
            self._takes &= ~entry.bit
        entry.rank = rank
        if rank is not None:
            insort(self._order, rank)
            self._takes |= entry.bit

    # Choice of an executor.

    def route(
        self,
        *,
        num_prompt_tokens: int,
        max_len: int,
        hashes: Sequence[int],
        needs_grammars: bool = False,
        session_address: str | None = None,
        may_wait: bool = False,
        refused_by: Collection[str] = (),
        pool: int | None = None,
    ) -> ReplicaLink | Verdict:
        """Choose among the executors that are ready.

        Args:
            num_prompt_tokens: Tokens of the prompt.
            max_len: Tokens of the prompt and of the longest output that it may have.
            hashes: `block_hashes` of the prompt.
            needs_grammars: True if only an executor that takes grammars can run it.
            session_address: The executor that ran the session last.
            may_wait: True if the request may still wait for that executor.
            refused_by: Instances that refused this request.
            pool: The tensor_parallel of the preferred executors; others are chosen only if none of these takes the
                request.
        """
        able = self._knows_grammars if needs_grammars else self._ready
        if not able:
            return Verdict.NO_CREDIT
        for instance_id in refused_by:
            if (refusing := self._by_instance.get(instance_id)) is not None:
                able &= ~refusing.bit
        if not able:
            return Verdict.REFUSED_BY_ALL
        able = self._long_enough(able, max_len)
        free = able & self._takes
        if not free:
            return Verdict.NO_CREDIT
        home = self._entries.get(session_address) if session_address is not None else None
        if home is not None and home.bit & able & ~self._suspect:
            if home.bit & free:
                return home.replica
            if may_wait:
                return Verdict.WAIT_FOR_SESSION
        free = free & ~self._suspect or free
        if pool is not None:
            free = free & self._pools.get(pool, 0) or free
        return self._cheapest(free, num_prompt_tokens, hashes).replica

    def matched_tokens(self, hashes: Sequence[int], replica: ReplicaLink) -> int:
        """Return the number of leading prompt tokens that a ready executor has probably cached."""
        return self._prefixes.matched_tokens(hashes, self._entries[replica.address].place)

    def record(self, hashes: Sequence[int], replica: ReplicaLink) -> None:
        """Record that a prompt with these block hashes was sent to a ready executor."""
        self._prefixes.record(hashes, self._entries[replica.address].place)

    def _long_enough(self, willing: int, max_len: int) -> int:
        able = longest = 0
        for length, mask in self._lengths.items():
            if mask & willing:
                longest = max(longest, length)
                if length >= max_len:
                    able |= mask
        # If no executor has a context that is long enough, the one with the longest refuses the request with its limit.
        return willing & (able or self._lengths[longest])

    def _cheapest(self, members: int, num_prompt_tokens: int, hashes: Sequence[int]) -> _Entry:
        best: _Choice | None = None
        for cached, alike in self._prefixes.by_matched_tokens(hashes, members):
            best = self._cheapest_alike(alike, num_prompt_tokens - cached, best)
        assert best is not None
        return best[-1]

    def _cheapest_alike(self, members: int, to_compute: int, best: _Choice | None) -> _Choice | None:
        """Return the cheapest of executors that would compute equally many tokens, or `best` if that is cheaper."""
        for load, running, address, entry in self._by_load(members):
            cost = load + to_compute
            if best is not None and (cost, running, address) >= best[:3]:
                break  # and neither could any that follow
            if members & entry.bit:
                replica = entry.replica
                cost += max(0, to_compute - replica.free_blocks * replica.block_size)
                if best is None or (cost, running, address) < best[:3]:
                    best = (cost, running, address, entry)
        return best

    def _by_load(self, members: int) -> Iterable[_Rank]:
        """Iterate over executors that take requests in the order of their load: all `members`, and perhaps others."""
        if members.bit_count() > _FEW:
            return self._order
        return sorted(rank for place in _places(members) if (rank := self._at_place[place].rank) is not None)


def _without(masks: Mapping[int, int], bit: int) -> dict[int, int]:
    return {key: mask for key, before in masks.items() if (mask := before & ~bit)}


def _places(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
