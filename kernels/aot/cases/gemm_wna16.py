"""Products with packed weights: the projections of Llama 3.1 8B, in the group sizes of AWQ and GPTQ and of GGUF."""

import torch
from torch import Tensor

from scalellm.kernels import WNA16_INTERLEAVE
from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops

_BF16 = torch.bfloat16
_HIDDEN = 4096
_SCRATCH = 16 * 64  # rows of a product, at most


def _meta(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _gemm(
    bits: int, rows: int, columns: int, group_size: int, *, zeros: bool = False, interleave: int = WNA16_INTERLEAVE
) -> Case:
    def call(ops: Ops) -> None:
        groups = _meta(_HIDDEN // group_size, columns)
        (ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm)(
            _meta(rows, _HIDDEN),
            _meta(_HIDDEN * bits // 32, columns, dtype=torch.int32),
            groups,
            groups if zeros else None,
            group_size=group_size,
            interleave=interleave,
            workspace=_meta(_SCRATCH * columns, dtype=torch.float32),
            out=_meta(rows, columns),
        )

    kind = f"{' zeros' if zeros else ''}{' plain' if interleave == 1 else ''}"
    what = f"w{bits}a16_gemm {rows}x{columns} groups of {group_size}{kind}"
    return Case(what, call, allocates=rows > 128)


CASES = (
    *(_gemm(4, rows, 6144, 128, zeros=True) for rows in (1, 32, 64, 128)),
    *(_gemm(4, rows, 28672, 128) for rows in (1, 32, 64)),
    *(_gemm(4, rows, 6144, 32, zeros=True) for rows in (1, 64, 128)),
    _gemm(4, 1, 6144, 128, zeros=True, interleave=1),
    *(_gemm(8, rows, 6144, 128) for rows in (1, 64, 128)),
    *(_gemm(8, rows, 6144, 32) for rows in (1, 64)),
    *(_gemm(bits, 1024, 6144, 128, zeros=zeros) for bits in (4, 8) for zeros in (False, True)),
)
