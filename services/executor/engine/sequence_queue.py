"""Sequences in the order in which they run."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from scalellm.services.executor.engine.sequence import Sequence


def _sort_key(seq: Sequence) -> tuple[int, int, int]:
    return seq.sort_key


class SequenceQueue:
    """A sorted list by priority, then arrival, then sample index.

    A preempted sequence arrived before anything that waits at its priority, so this order puts it in front. Inserting
    and removing move pointers (microseconds at ten thousand entries), which beats a heap with stale entries.
    """

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Insert in order."""
        insort(self._items, seq, key=_sort_key)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is in the queue."""
        index = bisect_left(self._items, seq.sort_key, key=_sort_key)
        if index == len(self._items) or self._items[index] is not seq:
            raise KeyError(f"sequence {seq.sort_key} is not queued")
        del self._items[index]

    def first(self) -> Sequence | None:
        """Return the first sequence in the order, or None."""
        return self._items[0] if self._items else None

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._items)

    def __len__(self) -> int:
        return len(self._items)
