"""The order of the rows of a mixture of experts in which the rows of each expert are adjacent."""

from typing import NamedTuple

import torch
from torch import Tensor

from scalellm.kernels.cpu.library import CpuLibrary


class RowsByExpert(NamedTuple):
    """P pairs of a token and a chosen expert, sorted by expert and then by token.

    `tokens [P]` i32 is the token of each pair, `starts [E + 1]` i32 the index of each expert's first pair and the end,
    and `places [T, k]` i32 the index of the pair of token t and its choice j.
    """

    tokens: Tensor
    starts: Tensor
    places: Tensor

    @classmethod
    def of(cls, library: CpuLibrary, ids: Tensor, num_experts: int) -> "RowsByExpert":
        """Return the order for the experts `ids [T, k]` i32 of T tokens.

        Raises:
            ValueError: an id is not that of an expert.
        """
        ids = ids.contiguous()
        tokens = torch.empty(ids.shape[0] * ids.shape[1], dtype=torch.int32)
        starts, places = torch.empty(num_experts + 1, dtype=torch.int32), torch.empty_like(ids)
        pointers = (ids.data_ptr(), tokens.data_ptr(), places.data_ptr(), starts.data_ptr())
        fault = library.call("sort_by_expert", *pointers, *ids.shape, num_experts)
        if fault >= 0:
            raise ValueError(f"ids[{fault}] is {ids[fault].tolist()}, there are {num_experts} experts")
        return cls(tokens, starts, places)

    @property
    def num_rows(self) -> int:
        """P."""
        return self.tokens.shape[0]


def pointers(rows: RowsByExpert | None, from_tokens: bool) -> tuple[int | None, int | None]:
    """Return the arguments `sources` and `starts` of a product; see gemm_dense.cpp."""
    if rows is None:
        return None, None
    return rows.tokens.data_ptr() if from_tokens else None, rows.starts.data_ptr()
