"""Preemption by swapping: cache blocks kept in host memory, where that is cheaper than computing them again."""

from collections.abc import Iterable
from dataclasses import dataclass

from scalellm.services.executor.engine.block_manager import BlockManager
from scalellm.services.executor.engine.host_block_pool import HostBlockPool
from scalellm.services.executor.engine.prefill_budget import PrefillBudget
from scalellm.services.executor.engine.sequence import HostCopy, Sequence


@dataclass(frozen=True, slots=True)
class SwapCost:
    """Time of moving cache blocks between device and host, as measured on this machine.

    bytes_per_block: of one block in all layers. seconds_per_transfer: what a transfer takes beside its bytes.
    """

    bytes_per_block: int
    bytes_per_second: float
    seconds_per_transfer: float = 0.0

    def seconds(self, num_blocks: int) -> float:
        """Return how long that many blocks take out and back in."""
        return 2 * (self.seconds_per_transfer + num_blocks * self.bytes_per_block / self.bytes_per_second)


class Swapper:
    """Copies the blocks of preempted sequences to host memory and back (vLLM's swapping, TensorRT-LLM's host cache).

    Leading blocks that other sequences hold as well are not copied: they are left to the prefix cache, and what comes
    after them is of use only if they are found there. Blocks that are found although they were copied are not copied
    back. All transfers of a step run before anything else in it, those to the host first, because blocks that were
    just given up are written by the rest.

    Without a `cost` nothing is ever kept.
    """

    def __init__(
        self, num_host_blocks: int, cost: SwapCost | None, blocks: BlockManager, prefill: PrefillBudget
    ) -> None:
        self._pool = HostBlockPool(num_host_blocks)
        self._cost = cost
        self._blocks = blocks
        self._prefill = prefill
        self._outs: list[tuple[int, int]] = []
        self._ins: list[tuple[int, int]] = []
        self._saved: list[Sequence] = []
        self._read: list[int] = []
        self.num_swaps = 0
        """Sequences whose blocks were copied to the host."""
        self.num_blocks_out = 0
        self.num_blocks_in = 0

    @property
    def num_blocks(self) -> int:
        """Host blocks in all."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Host blocks that hold nothing."""
        return self._pool.num_free

    def save(self, seq: Sequence) -> None:
        """Keep what is computed of a sequence that is about to lose its blocks, if that is possible and cheaper."""
        size = self._blocks.block_size
        # The last known token is computed again, for the token that follows it; so is what is still to be scored.
        num_tokens = min(seq.num_computed_tokens, len(seq.token_ids) - 1, seq.group.max_cached_tokens)
        first = min(self._blocks.num_shared_blocks(seq), num_tokens // size)
        table = seq.block_table[first : self._blocks.blocks_for(num_tokens)]
        per_token = self._prefill.seconds_per_token
        if not table or len(table) > self._pool.num_free or self._cost is None or per_token is None:
            return
        # Blocks that only this sequence published may be found again, but that is not certain while blocks are short.
        if self._cost.seconds(len(table)) >= (num_tokens - first * size) * per_token:
            return
        seq.host_copy = HostCopy(first, self._pool.take(len(table)), num_tokens)
        self._outs += zip(table, seq.host_copy.blocks, strict=True)
        self._saved.append(seq)
        self.num_swaps += 1
        self.num_blocks_out += len(table)

    def restore(self, seq: Sequence) -> None:
        """Bring back what an admitted sequence did not find in the prefix cache; its new blocks are as yet empty."""
        copy, seq.host_copy = seq.host_copy, None
        if copy is None:
            return
        self._read += copy.blocks
        num_found = seq.num_computed_tokens // self._blocks.block_size
        if num_found < copy.first_block:
            return  # the shared beginning is gone: all is computed again
        missing = range(num_found, copy.first_block + len(copy.blocks))
        self._ins += [(seq.block_table[index], copy.blocks[index - copy.first_block]) for index in missing]
        self.num_blocks_in += len(missing)
        seq.num_computed_tokens = max(seq.num_computed_tokens, copy.num_tokens)

    def drop(self, seq: Sequence) -> None:
        """Forget what was kept of a sequence that ends. Transfers to the blocks run before any later one."""
        if seq.host_copy is not None:
            self._pool.release(seq.host_copy.blocks)
            seq.host_copy = None

    def take_transfers(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[Sequence]]:
        """Return the (device block, host block) pairs to copy out and in, and whose blocks go out; once per step."""
        outs, ins, saved = self._outs, self._ins, self._saved
        self._outs, self._ins, self._saved = [], [], []
        # Not earlier: a block that this step reads must not be written by this step.
        self._pool.release(self._read)
        self._read = []
        return outs, ins, saved

    def check_integrity(self, waiting: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the host blocks in use are those of waiting sequences; for tests."""
        self._pool.check_integrity([block for seq in waiting if seq.host_copy for block in seq.host_copy.blocks])
