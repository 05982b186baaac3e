"""Norms for the hidden sizes of the presets."""

import torch

from scalellm.kernels.aot.recorder import Case
from scalellm.kernels.dispatch import Ops

_BF16, _E4M3 = torch.bfloat16, torch.float8_e4m3fn


def _norm(name: str, width: int, *, residual: bool = True, gemma: bool = False, epilogue: str = "") -> Case:
    """`epilogue`: "" or "e4m3", with a static scale, or "e4m3 tokens", with computed ones."""

    def call(ops: Ops) -> None:
        ops.fused_add_rms_norm(
            torch.empty(64, width, dtype=_BF16, device="meta"),
            torch.empty(64, width, dtype=_BF16, device="meta") if residual else None,
            torch.empty(width, dtype=_BF16, device="meta"),
            1e-5,
            gemma=gemma,
            quant_scale=torch.empty(1, device="meta") if epilogue == "e4m3" else None,
            token_scale=torch.empty(64, 1, device="meta") if epilogue == "e4m3 tokens" else None,
            out=torch.empty(64, width, dtype=_E4M3 if epilogue else _BF16, device="meta"),
        )

    return Case(f"fused_add_rms_norm {name}", call, min_sm=89 if epilogue else 80)


CASES = (
    _norm("4096", 4096),  # Llama 3.1 8B, Qwen3 8B, Mixtral 8x7B
    _norm("4096 first", 4096, residual=False),
    _norm("4096 e4m3", 4096, epilogue="e4m3"),
    _norm("4096 e4m3 tokens", 4096, epilogue="e4m3 tokens"),
    _norm("8192 e4m3 tokens", 8192, epilogue="e4m3 tokens"),
    _norm("8192", 8192),  # Llama 3.1 70B
    _norm("576", 576),  # SmolLM2 135M
    _norm("640 gemma", 640, gemma=True),  # Gemma 3 270M
)
