"""Products with packed integer weights in C++. Specified by the torch forms, `kernels.reference.w4a16`.

Inputs are rounded to 8 bits (-127 .. 127, times a scale for each group of `group_size` inputs of a row), so that the
products are those of integers, which is about as exact as bfloat16, and several times faster than float32. The order of
a sum is fixed, so a row's result does not depend on the other rows.

C++ reads weights in tiles of columns. A weight in the ops' common layout is converted to tiles for each call; to use a
weight repeatedly, make a `TiledWeight` of it once.
"""

import torch
from torch import Tensor

from scalellm.kernels.cpu.expert_rows import RowsByExpert, pointers
from scalellm.kernels.cpu.library import CODES, TILE, CpuLibrary
from scalellm.kernels.cpu.rows import check_ids
from scalellm.kernels.reference import w4a16 as reference


class TiledWeight:
    """A weight `[K, N]` of 4 or 8 bits, `words`, `scales` and `zeros` as for `kernels.w4a16_gemm` or `w8a16_gemm`.

    Or a stack of weights, where each of these has E matrices as for `kernels.fused_moe_wna16`; `num_columns` is N.
    Their memory becomes the tiles' if N is a multiple of TILE; another copy of one of them is made on the way.
    """

    def __init__(
        self, library: CpuLibrary, words: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int
    ) -> None:
        reference.check_shapes(words, scales, zeros, bits, group_size)
        self._library = library
        self._bits = bits
        self._group_size = group_size
        self.num_columns = words.shape[-1]
        self._num_weights = words.shape[0] if words.dim() == 3 else 1
        self._parts = tuple(_put_into_tiles(part) for part in (words, scales, zeros) if part is not None)

    @classmethod
    def of_copies(
        cls, library: CpuLibrary, words: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int
    ) -> "TiledWeight":
        """Make a TiledWeight of copies, which leaves the arguments' memory unchanged."""
        copies = _copied(words), _copied(scales), None if zeros is None else _copied(zeros)
        return cls(library, *copies, bits=bits, group_size=group_size)

    @staticmethod
    def takes(scales: Tensor, *, bits: int, group_size: int) -> bool:
        """Return whether a TiledWeight supports such scales and groups."""
        return scales.dtype in (torch.float32, torch.bfloat16) and group_size % (32 // bits) == 0

    def columns(self, indices: Tensor, *, scale: float = 1.0) -> Tensor:
        """Return some columns, times `scale`, as rows `[n, K]` of the dtype of the scales.

        Raises:
            ValueError: an index is not that of a column.
        """
        words, scales, *zeros = self._parts
        inputs, indices = scales.shape[-2] * self._group_size, indices.contiguous()
        out = scales.new_empty(indices.shape[0], inputs)
        fault = self._library.call(
            "gather_packed_rows",
            *(self._bits, CODES[scales.dtype], words.data_ptr(), scales.data_ptr()),
            *(zeros[0].data_ptr() if zeros else None, indices.data_ptr(), out.data_ptr()),
            *(indices.shape[0], inputs, self.num_columns, self._group_size, scale),
        )
        check_ids(fault, indices, self.num_columns)
        return out

    def product(
        self,
        x: Tensor,
        *,
        by_expert: RowsByExpert | None = None,
        from_tokens: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return `x [T, K]`, of the dtype of the scales, times the weight, `[T, N]`.

        `by_expert` and `from_tokens` are for a stack of weights, as in `TiledMatrix.product`.
        """
        words, scales, *zeros = self._parts
        x = x.contiguous()
        rows, inputs = x.shape[0] if by_expert is None else by_expert.num_rows, x.shape[1]
        if out is None:
            out = x.new_empty(rows, self.num_columns)
        self._library.call(
            "gemm_wna16",
            *(self._bits, CODES[x.dtype], x.data_ptr(), *pointers(by_expert, from_tokens), self._num_weights),
            *(words.data_ptr(), scales.data_ptr(), zeros[0].data_ptr() if zeros else None, out.data_ptr()),
            *(rows, self.num_columns, inputs, self._group_size),
        )
        return out


def w4a16_gemm(
    library: CpuLibrary,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    interleave: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.w4a16_gemm`."""
    if interleave > 1 or not _takes(x, scales, zeros, 4, group_size, out):
        return reference.w4a16_gemm(x, qweight, scales, zeros, group_size=group_size, interleave=interleave, out=out)
    return _gemm(library, x, qweight, scales, zeros, 4, group_size, out)


def w8a16_gemm(
    library: CpuLibrary,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    interleave: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C++ form of `kernels.w8a16_gemm`."""
    if interleave > 1 or not _takes(x, scales, zeros, 8, group_size, out):
        return reference.w8a16_gemm(x, qweight, scales, zeros, group_size=group_size, interleave=interleave, out=out)
    return _gemm(library, x, qweight, scales, zeros, 8, group_size, out)


def _takes(x: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor | None) -> bool:
    return (
        TiledWeight.takes(scales, bits=bits, group_size=group_size)
        and x.dtype == scales.dtype
        and (zeros is None or zeros.dtype == x.dtype)
        and (out is None or (out.dtype == x.dtype and out.is_contiguous()))
    )


def _gemm(
    library: CpuLibrary,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    out: Tensor | None,
) -> Tensor:
    weight = TiledWeight.of_copies(library, qweight, scales, zeros, bits=bits, group_size=group_size)
    return weight.product(x, out=out)


def _put_into_tiles(stack: Tensor) -> Tensor:
    """Return `[R, N]` as `[tiles, R, TILE]`, or `[E, R, N]` as E times the tiles, in its memory if that has room."""
    rows, columns = stack.shape[-2:]
    padded = torch.nn.functional.pad(stack, (0, -columns % TILE)) if columns % TILE else stack
    for matrix in padded if padded.dim() == 3 else (padded,):
        by_tiles = matrix.view(rows, -1, TILE).transpose(0, 1)
        matrix.view(by_tiles.shape).copy_(_copied(by_tiles))
    return padded.view(-1, rows, TILE)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
