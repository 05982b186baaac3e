"""The two capacity policies: they decide when a request may start, given the KV cache."""

from typing import Protocol

from scalellm.services.executor.engine.config import CapacityPolicy, EngineConfig
from scalellm.services.executor.engine.sampling_params import InvalidRequestError
from scalellm.services.executor.engine.sequence import SequenceGroup


class Capacity(Protocol):
    """Decides on admission; the scheduler preempts whenever blocks run out all the same."""

    def check(self, group: SequenceGroup) -> None:
        """Raise InvalidRequestError for a request that could never start."""

    def may_start(self, group: SequenceGroup) -> bool:
        """True if a request may leave the waiting queue now."""

    def spare_blocks(self, num_running: int) -> int:
        """Blocks to leave free when admitting beside `num_running` sequences."""

    def reserve(self, group: SequenceGroup) -> None:
        """Reserve for a request none of whose samples runs yet and which now starts."""

    def release(self, group: SequenceGroup) -> None:
        """Release the reservation of a request none of whose samples runs any more. It may never have had one."""


class MaxUtilization:
    """Admit what fits now, and preempt when blocks run out later.

    About 1 % of the blocks stay free at admission, so that a newcomer does not cause a preemption a few steps later.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._watermark = config.num_blocks // 100

    def check(self, group: SequenceGroup) -> None:
        """Accept every request, because EngineConfig guarantees that any single sequence fits."""

    def may_start(self, group: SequenceGroup) -> bool:
        """Return True: free blocks alone decide."""
        return True

    def spare_blocks(self, num_running: int) -> int:
        """Return the watermark, or 0 if nothing runs, so that a lone sequence can always start."""
        return self._watermark if num_running else 0

    def reserve(self, group: SequenceGroup) -> None:
        """Do nothing: this policy reserves no blocks."""

    def release(self, group: SequenceGroup) -> None:
        """Do nothing: this policy reserves no blocks."""


class GuaranteedNoEvict:
    """Admit a request only if its worst case (all samples up to max_tokens) can be reserved, so that none is
    preempted.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._num_blocks = config.num_blocks
        self._block_size = config.block_size
        self._reserved: dict[int, int] = {}
        self._total = 0

    def check(self, group: SequenceGroup) -> None:
        """Raise InvalidRequestError for a request whose worst case exceeds the whole cache."""
        worst = self._worst_case(group)
        if worst > self._num_blocks:
            raise InvalidRequestError(
                "n",
                f"{len(group.samples)} samples of up to {group.max_len} tokens need {worst} cache blocks of "
                f"{self._block_size} tokens, the executor has {self._num_blocks}: lower n or max_tokens",
            )

    def may_start(self, group: SequenceGroup) -> bool:
        """True if the request's worst case fits beside all reservations."""
        return self._total + self._worst_case(group) <= self._num_blocks

    def spare_blocks(self, num_running: int) -> int:
        """Return 0: the reservations make a margin unnecessary."""
        return 0

    def reserve(self, group: SequenceGroup) -> None:
        """Reserve the request's worst case."""
        self._reserved[group.arrival] = self._worst_case(group)
        self._total += self._reserved[group.arrival]

    def release(self, group: SequenceGroup) -> None:
        """Release the request's reservation."""
        self._total -= self._reserved.pop(group.arrival, 0)

    def _worst_case(self, group: SequenceGroup) -> int:
        per_sample = -(-group.max_len // self._block_size)
        # A fork copies the block of the prompt's last token at the latest, and shares those before it.
        shared = (group.num_prompt_tokens - 1) // self._block_size
        return shared + len(group.samples) * (per_sample - shared)


def make_capacity(config: EngineConfig) -> Capacity:
    """Return the policy that the configuration names."""
    if config.capacity_policy is CapacityPolicy.MAX_UTILIZATION:
        return MaxUtilization(config)
    return GuaranteedNoEvict(config)
