"""Pools of executors with equal numbers of devices, and the choice of the pool for new requests.

Under low load, few replicas with many devices each have the lowest latency; under high load, many replicas with few
devices each do. The load at which this changes depends on the devices, so by default it is predicted from measurements.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from scalellm.v1 import link_pb2, scheduler_pb2

if TYPE_CHECKING:
    from scalellm.services.scheduler.replica_link import ReplicaLink

PoolPolicy = Literal["fixed", "measured", "off"]

_UP, _DOWN, _DWELL = 64, 48, 5.0
"""Policy `fixed`, with the ScaleLLM paper's numbers: requests from which on the pool with the fewest devices per
executor is used, requests below which the one with the most is used, and seconds for which a pool is kept at least."""

_GAIN, _HELD = 0.10, 2.0
"""Policy `measured`: share by which another pool must be predicted to be faster, and seconds for which without a
break."""

_WEIGHT = 0.05
"""Weight of one request in the mean lengths."""

_FIRST_PROMPT, _FIRST_ANSWER = 256.0, 128.0
"""Mean lengths before the first request has ended."""


class Lengths:
    """Moving averages of the lengths of recent requests, in tokens.

    Attributes:
        prompt: Tokens of a prompt that had to be computed.
        answer: Tokens of an answer.
    """

    def __init__(self) -> None:
        self.prompt: float = _FIRST_PROMPT
        self.answer: float = _FIRST_ANSWER
        self._has_ended = False

    def expect(self, prompt: int, answer: int) -> None:
        """Take the lengths of an arriving request as the averages until the first request has ended.

        Args:
            prompt: Tokens of its prompt.
            answer: Its limit of output tokens; 0: it sets none.
        """
        if not self._has_ended:
            self.prompt, self.answer = prompt, answer or _FIRST_ANSWER

    def observe(self, prompt: int, answer: int) -> None:
        """Add the lengths of a request that ended to the averages."""
        self._has_ended = True
        self.prompt += _WEIGHT * (prompt - self.prompt)
        self.answer += _WEIGHT * (max(1, answer) - self.answer)


def predict(step: link_pb2.StepTime, num_requests: int, executors: int, rows: int, lengths: Lengths) -> float:
    """Predict the seconds from a request's arrival to its last token, the wait for a row included.

    The model assumes a steady state: requests are divided evenly among equal executors, and each request that ends is
    replaced by another.

    Args:
        step: Model of an executor's step time.
        num_requests: Number of queued and running requests.
        executors: Number of executors among which they are divided.
        rows: Most sequences that run on an executor at once.
        lengths: Mean lengths of a request.
    """
    wanted = max(1.0, num_requests / executors)
    running = min(wanted, float(rows))
    context = lengths.prompt + lengths.answer / 2
    # While one answer is generated, each other row takes a new request, whose prompt is computed in the same steps.
    prompts = running * lengths.prompt / lengths.answer
    seconds = step.base + running * (step.per_row + context * step.per_context_token) + prompts * step.per_prompt_token
    own = step.base + lengths.prompt * step.per_prompt_token
    return (own + lengths.answer * seconds) * wanted / running


@dataclass(eq=False)
class Pool:
    """The ready executors with the same number of devices each.

    Attributes:
        tensor_parallel: Devices that compute each token together.
        members: The executors by address.
        predicted: Predicted seconds per request if all requests ran in this pool; None = not known.
    """

    tensor_parallel: int
    members: dict[str, ReplicaLink] = field(default_factory=dict)
    predicted: float | None = None

    @property
    def num_running(self) -> int:
        """Number of requests that run in this pool."""
        return sum(len(replica.running) for replica in self.members.values())

    def predict(self, num_requests: int, lengths: Lengths) -> float | None:
        """See the function `predict`. None while no executor has reported a usable model of its step time.

        The executors of a pool are alike, so the one that joined first speaks for all.
        """
        for replica in self.members.values():
            if replica.load.HasField("step_time"):
                rows = replica.welcome.max_num_seqs if replica.welcome is not None else 1
                found = predict(replica.load.step_time, num_requests, len(self.members), max(1, rows), lengths)
                return found if math.isfinite(found) and found > 0.0 else None
        return None


class Pools:
    """Chooses the pool of new requests. Running requests stay where they are.

    Args:
        policy: `fixed`: by the number of requests. `measured`: to the pool with the lower predicted time to the last
            token; it is left only for one that is faster by a tenth for two seconds. `off`: to any executor.

    Attributes:
        lengths: Lengths of the requests, for predictions.
        num_switches: Number of changes of the chosen pool.
    """

    def __init__(self, policy: PoolPolicy) -> None:
        self.lengths = Lengths()
        self.num_switches = 0
        self._policy = policy
        self._pools: dict[int, Pool] = {}
        self._chosen: Pool | None = None
        self._reason = ""
        self._since = -math.inf
        self._better: Pool | None = None
        self._better_since = 0.0

    def join(self, replica: ReplicaLink) -> None:
        """Add an executor that became ready to its pool."""
        pool = self._pools.setdefault(replica.tensor_parallel, Pool(replica.tensor_parallel))
        pool.members[replica.address] = replica

    def leave(self, replica: ReplicaLink) -> None:
        """Remove an executor that is no longer ready from its pool."""
        for pool in tuple(self._pools.values()):
            if pool.members.get(replica.address) is replica:
                del pool.members[replica.address]
                if not pool.members:
                    del self._pools[pool.tensor_parallel]
                    if pool is self._chosen:
                        self._chosen = None

    def choose(self, num_requests: int, now: float) -> int | None:
        """Choose the pool for a new request. Returns its number of devices per executor; None: any executor will do.

        Args:
            num_requests: Number of queued and running requests, the new one included.
            now: Monotonic seconds.
        """
        if self._policy == "off" or len(self._pools) < 2:
            self._chosen, self._reason = (
                None,
                "there is no other pool" if len(self._pools) == 1 else "the policy is off",
            )
            return None
        if self._policy == "fixed":
            self._choose_fixed(num_requests, now)
        else:
            self._choose_measured(num_requests, now)
        return self._chosen.tensor_parallel if self._chosen is not None else None

    def describe(self) -> list[scheduler_pb2.PoolState]:
        """Return the pools for GetState, those with the most devices first."""
        return [
            scheduler_pb2.PoolState(
                tensor_parallel=pool.tensor_parallel,
                executors=len(pool.members),
                devices=sum(replica.num_devices for replica in pool.members.values()),
                running=pool.num_running,
                chosen=pool is self._chosen or self._chosen is None,
                predicted_s=pool.predicted,
                reason=self._reason if pool is self._chosen or self._chosen is None else "",
            )
            for pool in self._by_devices()
        ]

    def _by_devices(self) -> Sequence[Pool]:
        return sorted(self._pools.values(), key=lambda pool: -pool.tensor_parallel)

    def _choose_fixed(self, num_requests: int, now: float) -> None:
        large, *_, small = self._by_devices()
        if self._chosen in (large, small) and now - self._since < _DWELL:
            return
        if num_requests >= _UP:
            self._switch(small, f"{_UP} requests or more", now)
        elif num_requests < _DOWN or self._chosen not in (large, small):
            self._switch(large, f"fewer than {_DOWN} requests" if num_requests < _DOWN else f"fewer than {_UP}", now)

    def _choose_measured(self, num_requests: int, now: float) -> None:
        pools = self._by_devices()
        for pool in pools:
            pool.predicted = pool.predict(num_requests, self.lengths)
        known: Collection[Pool] = [pool for pool in pools if pool.predicted is not None]
        if len(known) < 2:
            self._chosen, self._reason = None, "the step times of other pools are not known yet"
            return
        best = min(known, key=_predicted)
        if self._chosen not in known:
            self._switch(best, _faster(best), now)
        elif _predicted(best) > (1 - _GAIN) * _predicted(self._chosen):
            self._better = None
        elif best is not self._better:
            self._better, self._better_since = best, now
        elif now - self._better_since >= _HELD:
            self._switch(best, _faster(best), now)

    def _switch(self, pool: Pool, reason: str, now: float) -> None:
        self._better = None
        if pool is not self._chosen:
            self.num_switches += self._chosen is not None
            self._chosen, self._reason, self._since = pool, reason, now


def _predicted(pool: Pool | None) -> float:
    return pool.predicted if pool is not None and pool.predicted is not None else math.inf


def _faster(pool: Pool) -> str:
    return f"{1e3 * _predicted(pool):.0f} ms to the last token are predicted, the least of all pools"
