"""Ranks as threads of this process, and models that are compared with what their ranks hold of them."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from scalellm.services.executor.models import CausalLM
from scalellm.services.executor.models.shard import Shard

_Result = TypeVar("_Result")
_PATIENCE = 120.0


class FakeGroup:
    """Meeting point of the threads of a group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=_PATIENCE)
        self.tensors: list[Tensor | None] = [None] * size


class FakeCollectives:
    """The collectives of a rank that is a thread; sums are added up in the order of the ranks."""

    def __init__(self, group: FakeGroup, rank: int) -> None:
        self._group = group
        self._rank = rank
        self.num_bytes = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        first, *others = self._meet(tensor)
        for other in others:
            first = first + other
        return tensor.copy_(first)

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.num_bytes += tensor.nbytes
        return torch.stack(self._meet(tensor))

    def _meet(self, tensor: Tensor) -> list[Tensor]:
        self._group.tensors[self._rank] = tensor.clone()
        self._group.barrier.wait()
        tensors = [tensor for tensor in self._group.tensors if tensor is not None]
        self._group.barrier.wait()  # before anybody puts the next one there
        assert len({(other.shape, other.dtype) for other in tensors}) == 1, "ranks meet with different tensors"
        return tensors


def fake_shards(size: int, expert_parallel: int = 1) -> list[Shard]:
    """Return what each of the ranks of a group holds."""
    group = FakeGroup(size)
    return [Shard(rank, size, expert_parallel, FakeCollectives(group, rank)) for rank in range(size)]


def run_ranks(shards: list[Shard], run: Callable[[Shard], _Result]) -> list[_Result]:
    """Run a function for each rank, all at once. Returns what it returned, by rank, or raises what it raised."""
    results: dict[int, _Result] = {}
    errors: list[BaseException] = []

    def of_rank(shard: Shard) -> None:
        try:
            results[shard.rank] = run(shard)
        except BaseException as error:
            errors.append(error)
            if isinstance(shard.collectives, FakeCollectives):
                shard.collectives._group.barrier.abort()  # the others wait for nothing

    threads = [threading.Thread(target=of_rank, args=(shard,)) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [results[shard.rank] for shard in shards]


def assert_ranks_make_up(whole: CausalLM, ranks: list[CausalLM]) -> int:
    """Check that what ranks hold, put together, is what one holds of the same checkpoint. Returns how many are cut.

    What a rank holds of a tensor is found by its window alone.
    """
    of_ranks = [{slot.name: slot for slot in rank.weight_slots()} for rank in ranks]
    num_cut = 0
    for slot in whole.weight_slots():
        mine = [slots[slot.name] for slots in of_ranks if slot.name in slots]
        assert mine, slot.name
        for number, expected in enumerate(slot.dests):
            parts = [part.dests[number] for part in mine]
            cut = [d for d in range(expected.dim()) if any(part.shape[d] != expected.shape[d] for part in parts)]
            assert len(cut) <= 1, slot.name
            if not cut:
                for part in parts:
                    assert _same(part, expected), slot.name
                continue
            num_cut += 1
            # Ranks that share a key and value head, or an expert, hold the same; scales of whole rows belong to all.
            windows = [str(part.window) for part in mine]
            distinct: dict[Any, Tensor] = (
                dict(zip(windows, parts, strict=True)) if len(set(windows)) > 1 else dict(enumerate(parts))
            )
            assert all(_same(distinct.get(w, part), part) for w, part in zip(windows, parts, strict=True)), slot.name
            assert _same(torch.cat(list(distinct.values()), cut[0]), expected), slot.name
    return num_cut


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )
