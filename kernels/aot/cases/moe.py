"""Expert layers for the shapes of Mixtral 8x7B and Qwen3 30B-A3B."""

import torch
from torch import Tensor

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops

_BF16, _E4M3 = torch.bfloat16, torch.float8_e4m3fn


def _meta(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _int(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int32)


def _float(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.float32)


def _grouped_by_torch(tokens: int, dtype: torch.dtype) -> bool:
    """True if a case is of torch's grouped product."""
    return tokens > 512 and dtype == _BF16


def _moe(
    name: str,
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    inner: int,
    *,
    dtype: torch.dtype = _BF16,
    block: int | None = None,
) -> Case:
    """`dtype` is that of the weights; where they are e4m3, `block` is the edge of a scale's square, None one scale for
    each output, and activations are bfloat16.
    """
    activations = _BF16 if dtype == _E4M3 else dtype

    def scale(rows: int, columns: int) -> Tensor | None:
        if dtype != _E4M3:
            return None
        return _float(experts, rows // (block or 1), columns // (block or columns))

    def call(ops: Ops) -> None:
        ops.fused_moe(
            _meta(tokens, hidden, dtype=activations),
            _meta(experts, 2 * inner, hidden, dtype=dtype),
            _meta(experts, hidden, inner, dtype=dtype),
            _float(tokens, k),
            _int(tokens, k),
            w13_scale=scale(2 * inner, hidden),
            w2_scale=scale(hidden, inner),
            workspace=_int(1 << 28),
            out=_meta(tokens, hidden, dtype=activations),
        )

    return Case(
        f"fused_moe {name}", call, min_sm=89 if dtype == _E4M3 else 80, allocates=_grouped_by_torch(tokens, dtype)
    )


def _packed(
    name: str,
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    inner: int,
    *,
    bits: int,
    group: int = 128,
    zeros: bool = False,
    dtype: torch.dtype = _BF16,
) -> Case:
    def call(ops: Ops) -> None:
        up = _meta(experts, hidden // group, 2 * inner, dtype=dtype)
        down = _meta(experts, inner // group, hidden, dtype=dtype)
        ops.fused_moe_wna16(
            _meta(tokens, hidden, dtype=dtype),
            _int(experts, hidden * bits // 32, 2 * inner),
            _int(experts, inner * bits // 32, hidden),
            _float(tokens, k),
            _int(tokens, k),
            w13_scales=up,
            w2_scales=down,
            w13_zeros=up if zeros else None,
            w2_zeros=down if zeros else None,
            bits=bits,
            group_size=group,
            workspace=_int(1 << 28),
            out=_meta(tokens, hidden, dtype=dtype),
        )

    return Case(f"fused_moe_wna16 {name}", call, allocates=_grouped_by_torch(tokens, dtype))


def _routing(name: str, experts: int, k: int) -> Case:
    def call(ops: Ops) -> None:
        ops.topk_softmax(_meta(64, experts), k, True, out=(_float(64, k), _int(64, k)))

    return Case(f"topk_softmax {name}", call)


def _align(ops: Ops) -> None:
    size = 128 + 8 * 15
    out = _int(size), _int(-(-size // 16)), _int(1)
    ops.moe_align_block_size(_int(64, 2), 16, 8, workspace=_int(8), out=out)


CASES = (
    _moe("Mixtral few", 16, 8, 2, 4096, 14336),
    _moe("Mixtral", 64, 8, 2, 4096, 14336),
    _moe("Mixtral many", 240, 8, 2, 4096, 14336),
    _moe("Mixtral prefill", 1024, 8, 2, 4096, 14336),
    _moe("Mixtral e4m3 few", 16, 8, 2, 4096, 14336, dtype=_E4M3),
    _moe("Mixtral e4m3", 64, 8, 2, 4096, 14336, dtype=_E4M3),
    _moe("Mixtral e4m3 prefill", 1024, 8, 2, 4096, 14336, dtype=_E4M3),
    _moe("Mixtral float16 prefill", 1024, 8, 2, 4096, 14336, dtype=torch.float16),
    _moe("Qwen3", 64, 128, 8, 2048, 768),
    _moe("Qwen3 e4m3 blocks", 64, 128, 8, 2048, 768, dtype=_E4M3, block=128),
    _packed("Mixtral int4 few", 16, 8, 2, 4096, 14336, bits=4, zeros=True),
    _packed("Mixtral int4", 64, 8, 2, 4096, 14336, bits=4, zeros=True),
    _packed("Mixtral int8", 64, 8, 2, 4096, 14336, bits=8),
    _packed("Mixtral int4 groups of 32 few", 16, 8, 2, 4096, 14336, bits=4, group=32),
    _packed("Mixtral int4 groups of 32", 64, 8, 2, 4096, 14336, bits=4, group=32),
    _packed("Mixtral int4 prefill", 1024, 8, 2, 4096, 14336, bits=4, zeros=True),
    _packed("Mixtral int4 float16 prefill", 1024, 8, 2, 4096, 14336, bits=4, dtype=torch.float16),
    _packed(
        "Mixtral int4 float16 prefill groups of 32", 1024, 8, 2, 4096, 14336, bits=4, group=32, dtype=torch.float16
    ),
    _packed("Qwen3 int4", 64, 128, 8, 2048, 768, bits=4),
    _routing("Mixtral", 8, 2),
    _routing("Qwen3", 128, 8),
    Case("moe_align_block_size", _align),
)
