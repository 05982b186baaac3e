"""Pools of executors that are alike, and which of them new requests go to.

Few replicas with many devices each answer soonest while little is asked of them; many with few devices each do once
much is. Where the one becomes better than the other depends on the devices, so it is measured by default.
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
"""fixed: from how many requests on the pool with the fewest devices per executor is used, below how many the one with
the most, and how many seconds a pool is used at least. The numbers are those of the ScaleLLM paper."""

_GAIN, _HELD = 0.10, 2.0
"""measured: by what share another pool must be predicted to be faster, and for how many seconds without a break."""

_WEIGHT = 0.05
"""Weight of one request in the mean lengths."""

_FIRST_PROMPT, _FIRST_ANSWER = 256.0, 128.0
"""Mean lengths before the first request has ended."""


class Lengths:
    """Mean tokens of the requests of late.

    Attributes:
        prompt: Tokens of a prompt that had to be computed.
        answer: Tokens of an answer.
    """

    def __init__(self) -> None:
        self.prompt: float = _FIRST_PROMPT
        self.answer: float = _FIRST_ANSWER
        self._has_ended = False

    def expect(self, prompt: int, answer: int) -> None:
        """A request has come: what it asks for counts until one has ended; answer: 0 where it sets no limit."""
        if not self._has_ended:
            self.prompt, self.answer = prompt, answer or _FIRST_ANSWER

    def observe(self, prompt: int, answer: int) -> None:
        """A request has ended."""
        self._has_ended = True
        self.prompt += _WEIGHT * (prompt - self.prompt)
        self.answer += _WEIGHT * (max(1, answer) - self.answer)


def predict(step: link_pb2.StepTime, num_requests: int, executors: int, rows: int, lengths: Lengths) -> float:
    """Seconds from a request's first step to its last token, and what it waits for a row.

    All requests are on executors of one kind, alike in number, and each one that ends makes room for another.

    Args:
        step: Model of the time of a step there.
        num_requests: Number of requests.
        executors: Among how many they are divided.
        rows: Sequences that run on an executor at once.
        lengths: Lengths of a request.
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
        predicted: Seconds of a request, if all there are were here; None = not known.
    """

    tensor_parallel: int
    members: dict[str, ReplicaLink] = field(default_factory=dict)
    predicted: float | None = None

    @property
    def num_running(self) -> int:
        """Requests that run here."""
        return sum(len(replica.running) for replica in self.members.values())

    def predict(self, num_requests: int, lengths: Lengths) -> float | None:
        """See `predict`; None while no executor has said how long its steps take, or what it says means nothing.

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
        """An executor is ready."""
        pool = self._pools.setdefault(replica.tensor_parallel, Pool(replica.tensor_parallel))
        pool.members[replica.address] = replica

    def leave(self, replica: ReplicaLink) -> None:
        """An executor is not ready any more."""
        for pool in tuple(self._pools.values()):
            if pool.members.get(replica.address) is replica:
                del pool.members[replica.address]
                if not pool.members:
                    del self._pools[pool.tensor_parallel]
                    if pool is self._chosen:
                        self._chosen = None

    def choose(self, num_requests: int, now: float) -> int | None:
        """Return the number of devices of the executors that a new request goes to; None: to any.

        Args:
            num_requests: Those that wait or run, with the new one.
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
        """Return the pools as GetState tells them, those with the most devices first."""
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
