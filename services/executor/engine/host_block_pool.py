"""Blocks of host memory, each as large as a cache block in all layers."""

from collections.abc import Iterable


class HostBlockPool:
    """Blocks `0 .. num_blocks - 1` of host memory. Each has at most one owner, so none is shared or looked up by
    content.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Allocate `count` blocks. The caller has checked `num_free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} host blocks wanted, {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """Free blocks."""
        self._free.extend(blocks)

    def check_integrity(self, owned: list[int]) -> None:
        """Raise AssertionError unless every block is either free or among the `owned`; for tests."""
        if sorted([*self._free, *owned]) != list(range(self.num_blocks)):
            raise AssertionError(f"host blocks: {self._free} are free, {owned} owned, of {self.num_blocks}")
