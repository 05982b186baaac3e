"""Reference-counted cache blocks with an O(1) free list in eviction order."""


class BlockPool:
    """Blocks `0 .. num_blocks - 1`; those without references form a doubly linked list, next to be reused first.

    The list is intrusive (two integer arrays and a sentinel), so that a block found by the prefix cache leaves the
    middle of it in O(1), as in vLLM's free-block queue.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.ref_counts = [0] * num_blocks
        self._sentinel = num_blocks
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._prev: list[int] = [num_blocks, *range(num_blocks)]

    def take(self) -> int:
        """Return the first free block, now with one reference. The caller has checked `num_free`."""
        block = self._next[self._sentinel]
        if block == self._sentinel:
            raise RuntimeError("no free block")
        self._unlink(block)
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference, taking the block out of the free list where it had none."""
        if self.ref_counts[block] == 0:
            self._unlink(block)
        self.ref_counts[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """Drop a reference. A block without any is free: reused last with `keep` (its content may serve again)."""
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            before = self._prev[self._sentinel] if keep else self._sentinel
            self._link_after(before, block)
        elif self.ref_counts[block] < 0:
            raise RuntimeError(f"block {block} released more often than taken")

    def free_blocks(self) -> list[int]:
        """Return the free list, next to be reused first; O(free blocks), for checks."""
        blocks: list[int] = []
        block = self._next[self._sentinel]
        while block != self._sentinel and len(blocks) <= self.num_blocks:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self.num_free -= 1

    def _link_after(self, before: int, block: int) -> None:
        after = self._next[before]
        self._prev[block], self._next[block] = before, after
        self._next[before] = self._prev[after] = block
        self.num_free += 1
