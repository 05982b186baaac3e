"""Reference-counted cache blocks with O(1) free lists, in the order in which they are reused."""

from collections.abc import Callable


class BlockPool:
    """Blocks `0 .. num_blocks - 1`. A block without references is in one of three free lists, reused in this order:
    empty blocks, blocks whose content the prefix cache may use again (least recently used first), and blocks set aside.

    The lists are intrusive (two integer arrays and a sentinel each), so that a block found by the prefix cache leaves
    the middle of one in O(1), as in vLLM's free-block queue.

    Args:
        num_blocks: Total number of blocks.
        run: A sequence gets its blocks, where possible, in runs of this many neighbours that begin at a multiple of it,
            because memory is read faster in order. The rest of a run is set aside for the sequence that holds the
            block before it, and cached content is evicted a run at a time.
        evict: Called with each block whose content is evicted.
    """

    def __init__(self, num_blocks: int, run: int = 1, evict: Callable[[int], None] = lambda _: None) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.ref_counts = [0] * num_blocks
        self._run = run
        self._evict = evict
        self._empty, self._kept, self._aside = range(num_blocks, num_blocks + 3)  # sentinels
        self._list_of = [self._empty] * num_blocks  # of those without references
        self._next: list[int] = [*range(1, num_blocks + 1), 0, self._kept, self._aside]
        self._prev: list[int] = [self._empty, *range(num_blocks), self._kept, self._aside]

    def take(self, after: int | None = None) -> int:
        """Allocate a free block, with one reference. The caller has checked `num_free`.

        Args:
            after: The previous block of the sequence, whose neighbour is preferred.
        """
        if after is not None and self._is_aside(after + 1):
            block = after + 1
        elif (block := self._next[self._empty]) != self._empty:
            self._set_aside(block)
        elif (block := self._next[self._kept]) != self._kept:
            block = self._give_up(block)
        elif (block := self._next[self._aside]) == self._aside:
            raise RuntimeError("no free block")
        self._unlink(block)
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block. A block without references leaves its free list."""
        if self.ref_counts[block] == 0:
            self._unlink(block)
        self.ref_counts[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """Drop a reference. A block without references becomes free; with `keep`, its content stays in the prefix
        cache.
        """
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            if keep:
                self._append(self._kept, block)
            else:
                self._link(self._empty, block, before=self._empty)
            while self._is_aside(block + 1):  # no sequence holds the block before it any more
                block += 1
                self._move(self._empty, block)
        elif self.ref_counts[block] < 0:
            raise RuntimeError(f"block {block} released more often than taken")

    def free_blocks(self) -> list[int]:
        """Return all free blocks, next to be reused first; O(free blocks), for checks."""
        blocks: list[int] = []
        for sentinel in (self._empty, self._kept, self._aside):
            block = self._next[sentinel]
            while block != sentinel and len(blocks) <= self.num_blocks:
                blocks.append(block)
                block = self._next[block]
        return blocks

    def _run_of(self, block: int) -> range:
        first = block - block % self._run
        return range(first, min(first + self._run, self.num_blocks))

    def _is_aside(self, block: int) -> bool:
        return block < self.num_blocks and block % self._run != 0 and self._list_of[block] == self._aside

    def _set_aside(self, taken: int) -> None:
        for block in range(taken + 1, self._run_of(taken).stop):
            if self._list_of[block] == self._empty:
                self._move(self._aside, block)

    def _give_up(self, block: int) -> int:
        """Evict the content of a block, and of its whole run if that is free. Returns the block to allocate."""
        run = self._run_of(block)
        if any(self.ref_counts[mate] for mate in run):
            self._evict(block)
            return block
        for mate in run:
            self._evict(mate)
            self._move(self._aside, mate)
        return run[0]

    def _move(self, sentinel: int, block: int) -> None:
        self._unlink(block)
        self._append(sentinel, block)

    def _append(self, sentinel: int, block: int) -> None:
        self._link(sentinel, block, before=self._prev[sentinel])

    def _link(self, sentinel: int, block: int, *, before: int) -> None:
        after = self._next[before]
        self._prev[block], self._next[block] = before, after
        self._next[before] = self._prev[after] = block
        self._list_of[block] = sentinel
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self._list_of[block] = -1
        self.num_free -= 1
