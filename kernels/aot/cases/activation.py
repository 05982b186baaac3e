"""Gated activations for the intermediate sizes of the presets."""

import torch

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops

_BF16, _E4M3 = torch.bfloat16, torch.float8_e4m3fn


def _gated(op: str, width: int, epilogue: str = "") -> Case:
    """`epilogue`: "" or "e4m3", with a static scale, or "e4m3 tokens", with computed ones."""

    def call(ops: Ops) -> None:
        getattr(ops, op)(
            torch.empty(64, 2 * width, dtype=_BF16, device="meta"),
            quant_scale=torch.empty(1, device="meta") if epilogue == "e4m3" else None,
            token_scale=torch.empty(64, 1, device="meta") if epilogue == "e4m3 tokens" else None,
            out=torch.empty(64, width, dtype=_E4M3 if epilogue else _BF16, device="meta"),
        )

    return Case(f"{op} {width} {epilogue}".rstrip(), call, min_sm=89 if epilogue else 80)


CASES = (
    _gated("silu_and_mul", 14336),  # Llama 3.1 8B, Mixtral 8x7B
    _gated("silu_and_mul", 14336, "e4m3"),
    _gated("silu_and_mul", 14336, "e4m3 tokens"),
    _gated("silu_and_mul", 28672, "e4m3 tokens"),  # Llama 3.1 70B
    _gated("silu_and_mul", 12288),  # Qwen3 8B
    _gated("silu_and_mul", 1536),  # SmolLM2 135M
    _gated("gelu_tanh_and_mul", 2048),  # Gemma 3 270M
    _gated("gelu_tanh_and_mul", 2048, "e4m3"),
    _gated("gelu_tanh_and_mul", 2048, "e4m3 tokens"),
)
