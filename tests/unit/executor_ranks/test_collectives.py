"""Sums of ranks on CPUs: a row's is the same whatever rows are beside it, as its text must not depend on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scalellm.kernels.cpu.torch_mode import RowWatch
from scalellm.services.executor.ranks.collectives import TorchCollectives


class Gathered(TorchCollectives):
    """The collectives of rank 0, given the tensors of the other ranks."""

    def __init__(self, *others: Tensor) -> None:
        self._others = others

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack((tensor, *self._others))


def test_ranks_are_added_up_in_their_order() -> None:
    large, small = torch.full((2, 3), 2.0**25), torch.ones(2, 3)
    total = large.clone()
    result = Gathered(small, -large).all_reduce(total)
    assert result is total
    assert torch.equal(total, torch.zeros(2, 3)), "(large + small) - large, in float32"
    assert torch.equal(Gathered(-large, small).all_reduce(large.clone()), small)


def test_what_was_gathered_is_not_changed() -> None:
    own, other = torch.ones(2), torch.ones(2)
    Gathered(other).all_reduce(own)
    assert (own.tolist(), other.tolist()) == ([2.0, 2.0], [1.0, 1.0])


@pytest.fixture
def group() -> Iterator[TorchCollectives]:
    """The group of one rank: what gloo is asked for is the same as with several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield TorchCollectives()
    finally:
        dist.destroy_process_group()


def test_what_depends_on_other_rows_is_seen_and_collectives_do_not(group: TorchCollectives) -> None:
    rows = torch.ones(3, 4)
    with RowWatch() as watch:
        group.all_reduce(group.all_gather(rows)[0].contiguous())
    assert watch.is_equal
    for work in (lambda: rows @ rows.T, rows.sum, lambda: rows.softmax(-1), rows.tanh):
        with RowWatch() as watch:
            work()
        assert not watch.is_equal
