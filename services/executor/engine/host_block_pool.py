"""Blocks of host memory, each as large as a cache block in all layers."""

from collections.abc import Iterable


class HostBlockPool:
    """Blocks `0 .. num_blocks - 1`, each of one owner at most; nothing in host memory is shared or searched."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return `count` blocks. The caller has checked `num_free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} host blocks wanted, {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """Take blocks back."""
        self._free.extend(blocks)

    def check_integrity(self, owned: list[int]) -> None:
        """Raise AssertionError unless every block is either free or among the `owned`; for tests."""
        if sorted([*self._free, *owned]) != list(range(self.num_blocks)):
            raise AssertionError(f"host blocks: {self._free} are free, {owned} owned, of {self.num_blocks}")
