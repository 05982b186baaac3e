"""Preemption by swapping: cache blocks are kept in host memory if that is cheaper than computing them again."""

from collections.abc import Iterable
from dataclasses import dataclass

from scalellm.services.executor.engine.block_manager import BlockManager
from scalellm.services.executor.engine.host_block_pool import HostBlockPool
from scalellm.services.executor.engine.prefill_budget import PrefillBudget
from scalellm.services.executor.engine.sequence import HostCopy, Sequence


@dataclass(frozen=True, slots=True)
class SwapCost:
    """Time of moving cache blocks between device and host, as measured on this machine.

    bytes_per_block: bytes of one block in all layers. seconds_per_transfer: fixed time of a transfer.
    """

    bytes_per_block: int
    bytes_per_second: float
    seconds_per_transfer: float = 0.0

    def seconds(self, num_blocks: int) -> float:
        """Return the seconds for swapping this many blocks out and in again."""
        return 2 * (self.seconds_per_transfer + num_blocks * self.bytes_per_block / self.bytes_per_second)


class Swapper:
    """Copies the blocks of preempted sequences to host memory and back (vLLM's swapping, TensorRT-LLM's host cache).

    Leading blocks that other sequences hold as well are not copied but left to the prefix cache; the copy of the
    following blocks is useful only if they are found there. Copied blocks that the prefix cache still has are not
    copied back. All transfers of a step run before its other work, and those to the host first, because the blocks just
    freed are written by the rest of the step.

    Without a `cost` no blocks are swapped out.
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
        """Number of sequences whose blocks were copied to the host, since start."""
        self.num_blocks_out = 0
        self.num_blocks_in = 0

    @property
    def num_blocks(self) -> int:
        """Total number of host blocks."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Number of free host blocks."""
        return self._pool.num_free

    def save(self, seq: Sequence) -> None:
        """Copy the blocks of a sequence that is being preempted to the host, if there is room and it is cheaper."""
        size = self._blocks.block_size
        # The last known token is computed again for its logits, and so are prompt positions still to be scored.
        num_tokens = min(seq.num_computed_tokens, len(seq.token_ids) - 1, seq.group.max_cached_tokens)
        first = min(self._blocks.num_shared_blocks(seq), num_tokens // size)
        table = seq.block_table[first : self._blocks.blocks_for(num_tokens)]
        per_token = self._prefill.seconds_per_token
        if not table or len(table) > self._pool.num_free or self._cost is None or per_token is None:
            return
        # Blocks that only this sequence has in the prefix cache may be evicted, as blocks are short, so they are
        # copied.
        if self._cost.seconds(len(table)) >= (num_tokens - first * size) * per_token:
            return
        seq.host_copy = HostCopy(first, self._pool.take(len(table)), num_tokens)
        self._outs += zip(table, seq.host_copy.blocks, strict=True)
        self._saved.append(seq)
        self.num_swaps += 1
        self.num_blocks_out += len(table)

    def restore(self, seq: Sequence) -> None:
        """Copy the blocks that an admitted sequence did not find in the prefix cache back from the host."""
        copy, seq.host_copy = seq.host_copy, None
        if copy is None:
            return
        self._read += copy.blocks
        num_found = seq.num_computed_tokens // self._blocks.block_size
        if num_found < copy.first_block:
            return  # the shared prefix was evicted, so the copy is useless
        missing = range(num_found, copy.first_block + len(copy.blocks))
        self._ins += [(seq.block_table[index], copy.blocks[index - copy.first_block]) for index in missing]
        self.num_blocks_in += len(missing)
        seq.num_computed_tokens = max(seq.num_computed_tokens, copy.num_tokens)

    def drop(self, seq: Sequence) -> None:
        """Free the host blocks of a sequence that ends. Transfers run in order, so pending ones to them do no harm."""
        if seq.host_copy is not None:
            self._pool.release(seq.host_copy.blocks)
            seq.host_copy = None

    def take_transfers(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[Sequence]]:
        """Return the (device block, host block) pairs to copy out and in, and the sequences copied out; called once per
        step.
        """
        outs, ins, saved = self._outs, self._ins, self._saved
        self._outs, self._ins, self._saved = [], [], []
        # Freed only now, because the transfers out of this step must not write to a block that it reads.
        self._pool.release(self._read)
        self._read = []
        return outs, ins, saved

    def check_integrity(self, waiting: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the host blocks in use are those of waiting sequences; for tests."""
        self._pool.check_integrity([block for seq in waiting if seq.host_copy for block in seq.host_copy.blocks])
