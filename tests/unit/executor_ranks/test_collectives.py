"""Sums of ranks on CPUs: a row's is the same whatever rows are beside it, as its text must not depend on them."""

from __future__ import annotations

import torch
from torch import Tensor

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
