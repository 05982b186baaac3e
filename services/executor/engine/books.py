"""Accounting of the engine: its requests, counts of how requests ended, and the credits that every link used."""

import heapq
from dataclasses import dataclass, field

from scalellm.services.common.histogram import SEQUENCE_COUNTS, STEP_SECONDS, TOKEN_COUNTS, WAIT_SECONDS, Histogram
from scalellm.services.executor.engine.request import RequestFinish, RequestKey, RequestStatus
from scalellm.services.executor.engine.sampling_params import InvalidRequestError
from scalellm.services.executor.engine.sequence import SequenceGroup


@dataclass(frozen=True, slots=True)
class LinkCredits:
    """Cumulative counts of one link, from which the link layer grants credits.

    `admitted_prefill_tokens`: credits of prompt tokens of its requests that have left the waiting queue, because they
    ran or ended.
    """

    admitted_prefill_tokens: int
    completed_requests: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The engine's current state.

    `running` and `waiting` count requests (a preempted request is a running one), the `_sequences` fields samples;
    `waiting_prefill_tokens` are tokens to compute for waiting sequences, prefix-cache hits not subtracted.
    `free_host_blocks` of the `total_host_blocks` for swapping are unused.
    """

    free_blocks: int
    cached_blocks: int
    total_blocks: int
    running: int
    waiting: int
    running_sequences: int
    waiting_sequences: int
    waiting_prefill_tokens: int
    free_host_blocks: int
    total_host_blocks: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since start. At all times accepted = finished + cancelled + deadline_exceeded + failed + load's running +
    waiting; `rejected` requests were never accepted. Prefix-cache counts are prompt tokens looked up and found.
    `drafts` are the rows that were followed by drafted tokens, `draft_tokens` these tokens, `accepted_tokens` those of
    them that were accepted. `speculation` is a state and no count: on; idle if speculation is enabled but no decode
    step so far could verify drafts; off. `swaps` are the preemptions that kept cache content in host memory; the blocks
    are those copied there and back.
    """

    accepted: int
    rejected: int
    finished: int
    cancelled: int
    deadline_exceeded: int
    failed: int
    preemptions: int
    swaps: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    steps: int
    failed_steps: int
    computed_tokens: int
    generated_tokens: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    speculation: str
    prefix_cache_queries: int
    prefix_cache_hits: int


@dataclass(frozen=True, slots=True)
class EngineHistograms:
    """Distributions since start. Per step: seconds on the device, tokens, sequences; per request: seconds in the queue
    before its first step.
    """

    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_COUNTS))
    step_sequences: Histogram = field(default_factory=lambda: Histogram(SEQUENCE_COUNTS))
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(WAIT_SECONDS))


class _Link:
    def __init__(self) -> None:
        self.groups: dict[RequestKey, SequenceGroup] = {}
        self.admitted_prefill_tokens = 0
        self.completed_requests = 0


class Books:
    """Index and counters of the accepted requests. Each enters once and leaves once; counters are O(1) per event."""

    def __init__(self) -> None:
        self._groups: dict[RequestKey, SequenceGroup] = {}
        self._executions: dict[bytes, SequenceGroup] = {}
        self._links: dict[int, _Link] = {}
        self._deadlines: list[tuple[float, int, RequestKey]] = []
        self.accepted = 0
        self.rejected = 0
        self.waiting = 0
        """Number of requests that have never been scheduled."""
        self.ended = dict.fromkeys(RequestStatus, 0)

    def __len__(self) -> int:
        return len(self._groups)

    def get(self, key: RequestKey) -> SequenceGroup | None:
        """Return the request if it has not ended."""
        return self._groups.get(key)

    def unfinished(self) -> list[RequestKey]:
        """Return the keys of all requests that have not ended."""
        return list(self._groups)

    def of_execution(self, execution_id: bytes) -> SequenceGroup | None:
        """Return the attempt to run this execution that has not ended."""
        return self._executions.get(execution_id)

    def of_link(self, link: int) -> list[SequenceGroup]:
        """Return the requests of a link that have not ended."""
        return list(self._links[link].groups.values()) if link in self._links else []

    def check_new(self, key: RequestKey) -> None:
        """Raise InvalidRequestError if the key is in use."""
        if key in self._groups:
            raise InvalidRequestError("handle", f"{key[1]} is in use on this link")

    def enter(self, group: SequenceGroup) -> None:
        """Accept a request."""
        self._groups[group.key] = group
        if group.request.execution_id:
            self._executions[group.request.execution_id] = group
        self._links.setdefault(group.key[0], _Link()).groups[group.key] = group
        self.accepted += 1
        self.waiting += 1
        if group.request.deadline is not None:
            heapq.heappush(self._deadlines, (group.request.deadline, group.arrival, group.key))
            self._drop_stale_deadlines()

    def started(self, group: SequenceGroup) -> None:
        """Record that a request was scheduled for the first time."""
        self.waiting -= 1
        charged = group.request.charged_tokens
        self._links[group.key[0]].admitted_prefill_tokens += group.num_prompt_tokens if charged is None else charged

    def leave(self, group: SequenceGroup, status: RequestStatus, message: str, now: float) -> RequestFinish:
        """End a request and return its one RequestFinish."""
        del self._groups[group.key]
        if group.request.execution_id:
            del self._executions[group.request.execution_id]
        link = self._links[group.key[0]]
        del link.groups[group.key]
        if not group.was_scheduled:
            self.started(group)
        link.completed_requests += 1
        self.ended[status] += 1
        return RequestFinish(group.key, status, message, group.usage(), group.timings(now))

    def expired(self, now: float) -> list[SequenceGroup]:
        """Return the requests whose deadline has come, once each; O(log n) per request."""
        groups = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, arrival, key = heapq.heappop(self._deadlines)
            group = self._groups.get(key)
            if group is not None and group.arrival == arrival:
                groups.append(group)
        return groups

    def forget_link(self, link: int) -> None:
        """Drop the counters of a link that has no requests left."""
        self._links.pop(link, None)

    def credits(self, link: int) -> LinkCredits:
        """Return a link's counters; zeros before its first request."""
        found = self._links.get(link)
        return LinkCredits(found.admitted_prefill_tokens, found.completed_requests) if found else LinkCredits(0, 0)

    def check_integrity(self) -> None:
        """Raise AssertionError unless each index holds exactly the requests that have not ended; for tests."""
        named = {group.request.execution_id: group for group in self._groups.values() if group.request.execution_id}
        if self._executions != named:
            raise AssertionError("executions and requests do not add up")

    def _drop_stale_deadlines(self) -> None:
        # Requests usually end long before their deadline: keep the heap within twice the live requests.
        if len(self._deadlines) > 2 * len(self._groups) + 64:
            live = {group.arrival for group in self._groups.values()}
            self._deadlines = [entry for entry in self._deadlines if entry[1] in live]
            heapq.heapify(self._deadlines)
