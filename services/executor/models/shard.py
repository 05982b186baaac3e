"""The parts of a model that each of several ranks holds, and the sums that put their results together.

A rank is a process with a device of its own. Attention is divided by heads, gated MLPs by their inner features, and the
vocabulary by tokens; experts go to groups of ranks, and each is divided within its group. A sum over all ranks
completes the partial results of a division.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.model_config.errors import UnsupportedModelError


class Part(NamedTuple):
    """The features `start .. stop - 1` of the `whole` that a dimension has."""

    start: int
    stop: int
    whole: int

    @classmethod
    def all(cls, whole: int) -> "Part":
        """Return the part that is everything."""
        return cls(0, whole, whole)

    @property
    def size(self) -> int:
        """Number of features."""
        return self.stop - self.start

    @property
    def is_cut(self) -> bool:
        """True if it is not everything."""
        return self.size < self.whole

    def times(self, size: int) -> "Part":
        """Return the part of features of which `size` each belong to one of these."""
        return Part(self.start * size, self.stop * size, self.whole * size)


class Collectives(Protocol):
    """Sums and exchanges of all ranks. Each calls the same methods in the same order, with tensors of equal shapes."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks, the same bits on each; the memory of the contiguous argument may hold it."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, stacked by rank: `[size, ...]`."""


class Alone:
    """The collectives of a rank that is the only one."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor with a dimension of one before the others."""
        return tensor.unsqueeze(0)


@dataclass(frozen=True)
class Shard:
    """The part of rank `rank` of `size`; the experts go to `expert_parallel` groups of as many ranks each.

    Methods that divide raise UnsupportedModelError, with the numbers, if that cannot be done.
    """

    rank: int = 0
    size: int = 1
    expert_parallel: int = 1
    collectives: Collectives = field(default_factory=Alone)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank is {self.rank}; it must be at least 0 and less than size, {self.size}")
        if self.size % self.expert_parallel:
            raise UnsupportedModelError(
                f"expert_parallel {self.expert_parallel} does not divide tensor_parallel, {self.size}"
            )

    @property
    def is_whole(self) -> bool:
        """True if there is one rank, which holds everything."""
        return self.size == 1

    def check(self, config: ModelConfig) -> None:
        """Raise UnsupportedModelError if the model's heads or experts cannot be divided. Called before the
        ranks meet.
        """
        self.config_of_rank(config)
        if any(config.sparse_layers):
            self.experts(config)
        elif self.expert_parallel > 1:
            raise UnsupportedModelError(f"expert_parallel {self.expert_parallel}: the model has no experts")

    def heads(self, config: ModelConfig) -> Part:
        """Return the query heads of this rank."""
        if config.num_heads % self.size:
            raise self._indivisible(f"num_attention_heads {config.num_heads} is not a multiple of it")
        return self._share(config.num_heads, 1)

    def kv_heads(self, config: ModelConfig) -> Part:
        """Return the key and value heads that the query heads of this rank read; several ranks may have the same."""
        heads = config.num_kv_heads
        if heads % self.size == 0:
            return self._share(heads, 1)
        if self.size % heads:
            raise self._indivisible(f"num_key_value_heads {heads} is neither a multiple nor a divisor of it")
        first = self.rank * heads // self.size
        return Part(first, first + 1, heads)

    def config_of_rank(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration with the heads of this rank alone: that of its attention and of its KV cache."""
        if self.is_whole:
            return config
        return replace(config, num_heads=self.heads(config).size, num_kv_heads=self.kv_heads(config).size)

    def inner(self, name: str, whole: int, border: int) -> Part:
        """Return the inner features of the MLP `name` of this rank; they end at multiples of `border`."""
        return self._checked_share(f"{name}: {whole} inner features", whole, border)

    def vocabulary(self, whole: int) -> Sequence[Part]:
        """Return the tokens of each rank."""
        border = _even_border(whole)
        return [
            replace(self, rank=rank)._checked_share(f"vocab_size {whole}", whole, border) for rank in range(self.size)
        ]

    def experts(self, config: ModelConfig) -> Part:
        """Return the experts of this rank."""
        count, groups = config.num_experts, self.expert_parallel
        if count % groups:
            raise UnsupportedModelError(f"expert_parallel {groups}: num_experts {count} is not a multiple of it")
        group = self.rank // (self.size // groups)
        return Part(group * count // groups, (group + 1) * count // groups, count)

    def inner_of_experts(self, name: str, whole: int, border: int) -> Part:
        """Return the inner features that this rank has of each of its experts."""
        sharing = self.size // self.expert_parallel
        return replace(self, rank=self.rank % sharing, size=sharing, expert_parallel=1).inner(name, whole, border)

    def _checked_share(self, what: str, whole: int, border: int) -> Part:
        if whole // border < self.size:
            raise self._indivisible(f"{what} can be divided only at multiples of {border}")
        return self._share(whole, border)

    def _share(self, whole: int, border: int) -> Part:
        pieces = whole // border
        start, stop = (number * pieces // self.size for number in (self.rank, self.rank + 1))
        return Part(start * border, stop * border if self.rank < self.size - 1 else whole, whole)

    def _indivisible(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"tensor_parallel {self.size}: {why}")


def _even_border(whole: int) -> int:
    """Return the largest of 16, 8, 4, 2 and 1 that divides a size: kernels are fast on such shares."""
    return 16 if whole % 16 == 0 else whole & -whole


def join_columns(gathered: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return `[R, whole]` of what ranks have of each row, `[size, R, widest part]`, padded behind its columns."""
    if len(parts) == 1:
        return gathered[0]
    return torch.cat([columns[:, : part.size] for columns, part in zip(gathered, parts, strict=True)], dim=1)
