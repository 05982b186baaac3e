"""Products of float32 inputs with weights of 16 or 32 bit floating point numbers in C++, in float32.

The order of a sum does not depend on which rows are computed together, so neither does a row's result, unlike with
torch's products. A 16-bit weight is read as it is and widened on the way. If the CPU has bfloat16 products (AVX-512
BF16, AMX), inputs of bfloat16 weights are rounded to bfloat16, as on a GPU.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from scalellm.kernels.cpu.expert_rows import RowsByExpert, pointers
from scalellm.kernels.cpu.library import CODES, TILE, CpuLibrary
from scalellm.kernels.cpu.rows import check_ids

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TiledMatrix:
    """A weight `[N, K]` of one of DTYPES, or a stack of them `[E, N, K]`, in tiles of TILE rows.

    Rows of a weight are columns of the product; `num_columns` is N. The memory of `matrix`, which is contiguous,
    becomes that of the tiles if N is a multiple of TILE and, of bfloat16, K is even.
    """

    def __init__(self, library: CpuLibrary, matrix: Tensor) -> None:
        self._library = library
        self.num_columns, self._num_inputs = matrix.shape[-2:]
        self._num_weights = matrix.shape[0] if matrix.dim() == 3 else 1
        self._dtype = CODES[matrix.dtype]
        depth = 2 if matrix.dtype == torch.bfloat16 else 1  # `kDepth` in tile.h
        missing = (0, -self._num_inputs % depth, 0, -self.num_columns % TILE)
        padded = pad(matrix, missing) if any(missing) else matrix
        self._tiles = padded.view(-1, TILE, padded.shape[-1])
        for tile in self._tiles:
            by_inputs = tile.unflatten(1, (-1, depth)).transpose(0, 1)
            tile.view(by_inputs.shape).copy_(by_inputs.clone(memory_format=torch.contiguous_format))

    def rows(self, indices: Tensor, *, scale: float = 1.0) -> Tensor:
        """Return rows `indices [n]` i64 of the weight, times `scale`, `[n, K]` float32.

        Raises:
            ValueError: an index is not that of a row.
        """
        indices = indices.contiguous()
        out = torch.empty(indices.shape[0], self._num_inputs, dtype=torch.float32)
        fault = self._library.call(
            "gather_tiled_rows",
            *(self._dtype, self._tiles.data_ptr(), indices.data_ptr(), out.data_ptr()),
            *(indices.shape[0], self._num_inputs, self.num_columns, scale),
        )
        check_ids(fault, indices, self.num_columns)
        return out

    def product(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        by_expert: RowsByExpert | None = None,
        from_tokens: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return `x W^T + bias`, `[T, N]`, in `out` where it is given; `x [T, K]`, `bias [N]` and result float32. `out`
        must not overlap `x`.

        With a stack of weights, `by_expert` says which rows are multiplied with which one: the P rows of its order,
        which are those of the result, and of `x` as well unless `from_tokens`.
        """
        x = x.contiguous()
        rows = x.shape[0] if by_expert is None else by_expert.num_rows
        if out is None:
            out = x.new_empty(rows, self.num_columns)
        self._library.call(
            "gemm_dense",
            *(self._dtype, x.data_ptr(), *pointers(by_expert, from_tokens), self._num_weights),
            *(self._tiles.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()),
            *(rows, self.num_columns, self._num_inputs),
        )
        return out
