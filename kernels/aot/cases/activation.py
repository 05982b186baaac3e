"""Gated activations for the intermediate sizes of the presets."""

import torch

from kernels.aot.recorder import Case
from kernels.dispatch import Ops

_BF16, _E4M3 = torch.bfloat16, torch.float8_e4m3fn


def _gated(op: str, width: int, *, quantised: bool = False) -> Case:
    def call(ops: Ops) -> None:
        getattr(ops, op)(
            torch.empty(64, 2 * width, dtype=_BF16, device="meta"),
            quant_scale=torch.empty(1, device="meta") if quantised else None,
            out=torch.empty(64, width, dtype=_E4M3 if quantised else _BF16, device="meta"),
        )

    return Case(f"{op} {width}{' e4m3' if quantised else ''}", call, min_sm=89 if quantised else 80)


CASES = (
    _gated("silu_and_mul", 14336),  # Llama 3.1 8B, Mixtral 8x7B
    _gated("silu_and_mul", 14336, quantised=True),
    _gated("silu_and_mul", 12288),  # Qwen3 8B
    _gated("silu_and_mul", 1536),  # SmolLM2 135M
    _gated("gelu_tanh_and_mul", 2048),  # Gemma 3 270M
    _gated("gelu_tanh_and_mul", 2048, quantised=True),
)
