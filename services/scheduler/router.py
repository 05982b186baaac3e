"""Chooses the executor of a request: filter, score, pick."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from services.scheduler.prefix_index import PrefixIndex

# What one running sequence costs a newcomer, in prefill tokens: it takes a row of each decode step. A rough weight,
# there to spread equal requests evenly; a cached prefix of a few blocks outweighs a handful of sequences.
_TOKENS_PER_RUNNING = 16


class Candidate(Protocol):
    """What the router must know of an executor that is ready and not draining."""

    @property
    def address(self) -> str:
        """host:port."""

    @property
    def instance_id(self) -> str:
        """Its incarnation."""

    @property
    def has_credit(self) -> bool:
        """Whether it takes another request now."""

    @property
    def is_suspect(self) -> bool:
        """Whether this incarnation lost its requests before and has shown no progress since."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""

    @property
    def block_size(self) -> int:
        """Tokens per cache block."""

    @property
    def free_blocks(self) -> int:
        """Cache blocks that are free or can be evicted."""

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens that wait there to be computed."""

    @property
    def num_running(self) -> int:
        """Sequences that run there."""


class Verdict(enum.Enum):
    """Why no executor was picked."""

    NO_CREDIT = enum.auto()
    """Those that could run it are busy, or not there."""
    WAIT_FOR_SESSION = enum.auto()
    """Another executor would take it, but its session's own one is only out of credits."""
    REFUSED_BY_ALL = enum.auto()
    """All have refused it."""


CandidateT = TypeVar("CandidateT", bound=Candidate)


class Router:
    """Picks the executor on which a request's first token should come soonest.

    A session stays on the executor that ran it last while that one is ready: nearly all of its prompt is cached there.
    When that executor is out of credits the request waits for it a short, bounded time (credits come back with each
    step) and then moves like any other request, because a cached prefix is worth the time of computing it and no more.

    Other requests go where fewest tokens have to be computed before and for their first token: what waits there, plus
    the part of the prompt that is probably not cached there, plus a share for running sequences and for cache blocks
    that would have to be taken from others. A suspect executor (a hanging engine behind a live front looks idle, which
    would attract everything) is the last choice.

    Args:
        prefixes: Where prompt prefixes are cached.
    """

    def __init__(self, prefixes: PrefixIndex) -> None:
        self._prefixes = prefixes

    def route(
        self,
        candidates: Sequence[CandidateT],
        *,
        num_prompt_tokens: int,
        max_len: int,
        hashes: Sequence[int],
        session_address: str | None = None,
        may_wait: bool = False,
        refused_by: Collection[str] = (),
    ) -> CandidateT | Verdict:
        """Choose.

        Args:
            candidates: Executors that are ready and know how to run it.
            num_prompt_tokens: Tokens of the prompt.
            max_len: Tokens of the prompt and of the longest output that it may have.
            hashes: `block_hashes` of the prompt.
            session_address: The executor that ran the session last.
            may_wait: Whether it may still wait for that one.
            refused_by: Instances that refused this request.
        """
        if not candidates:
            return Verdict.NO_CREDIT
        willing = [candidate for candidate in candidates if candidate.instance_id not in refused_by]
        if not willing:
            return Verdict.REFUSED_BY_ALL
        # Where no executor is long enough, the longest comes nearest; it may say so to the client.
        enough = min(max_len, max(candidate.max_model_len for candidate in willing))
        able = [candidate for candidate in willing if candidate.max_model_len >= enough]
        free = [candidate for candidate in able if candidate.has_credit]
        if not free:
            return Verdict.NO_CREDIT
        for candidate in able:
            if candidate.address == session_address and not candidate.is_suspect:
                if candidate.has_credit:
                    return candidate
                if may_wait:
                    return Verdict.WAIT_FOR_SESSION
        return min(free, key=lambda candidate: self._cost(candidate, num_prompt_tokens, hashes))

    def _cost(self, candidate: Candidate, num_prompt_tokens: int, hashes: Sequence[int]) -> tuple[bool, int, int, str]:
        cached = self._prefixes.matched_tokens(hashes, candidate.instance_id)
        to_compute = num_prompt_tokens - cached
        missing = max(0, to_compute - candidate.free_blocks * candidate.block_size)
        running = candidate.num_running
        cost = to_compute + missing + candidate.pending_prefill_tokens + _TOKENS_PER_RUNNING * running
        return candidate.is_suspect, cost, running, candidate.address
