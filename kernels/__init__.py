"""Public ops of the model and the sampler. Import them from here.

The functions here are the torch forms: they run on any device, and are made for the CPU. `select_ops` gives the same
ops in the forms that suit a device; see `kernels.dispatch`.

Every op writes into `out` when it is given and returns it, and allocates the result otherwise. Ops whose names end in
an underscore change their first argument. A cache is `[num_blocks, page_size, Hkv, D]`, K and V apart, page_size 16, 32
or 64; a slot is `block_id * page_size + offset`. A batch may be empty.
"""

from scalellm.kernels.capability import Capability
from scalellm.kernels.dispatch import Backend, Ops, select_ops
from scalellm.kernels.launch import Launch
from scalellm.kernels.reference.activation import gelu_tanh_and_mul, silu_and_mul
from scalellm.kernels.reference.attention import paged_attention_decode, unified_attention
from scalellm.kernels.reference.cache import copy_blocks_, swap_blocks
from scalellm.kernels.reference.linear import Gate, RowNorm, fused_linear, num_squares
from scalellm.kernels.reference.logits import apply_logits_processors_
from scalellm.kernels.reference.lora import lora_expand, lora_shrink
from scalellm.kernels.reference.moe import fused_moe, fused_moe_wna16, moe_align_block_size, topk_softmax
from scalellm.kernels.reference.norm import fused_add_rms_norm
from scalellm.kernels.reference.quant import fp8_gemm, scaled_fp8_quant
from scalellm.kernels.reference.rng import sample_seed
from scalellm.kernels.reference.rope import qk_norm_rope_and_cache
from scalellm.kernels.reference.sampling import SampleOutput, sample
from scalellm.kernels.reference.w4a16 import w4a16_gemm, w8a16_gemm
from scalellm.kernels.splits import decode_workspace, num_decode_splits
from scalellm.kernels.workspaces import (
    WNA16_INTERLEAVE,
    fused_moe_workspace_size,
    gemm_wna16_workspace_size,
    sample_workspace_size,
)

__all__ = [
    "WNA16_INTERLEAVE",
    "Backend",
    "Capability",
    "Gate",
    "Launch",
    "Ops",
    "RowNorm",
    "SampleOutput",
    "apply_logits_processors_",
    "copy_blocks_",
    "decode_workspace",
    "fp8_gemm",
    "fused_add_rms_norm",
    "fused_linear",
    "fused_moe",
    "fused_moe_wna16",
    "fused_moe_workspace_size",
    "gelu_tanh_and_mul",
    "gemm_wna16_workspace_size",
    "lora_expand",
    "lora_shrink",
    "moe_align_block_size",
    "num_decode_splits",
    "num_squares",
    "paged_attention_decode",
    "qk_norm_rope_and_cache",
    "sample",
    "sample_seed",
    "sample_workspace_size",
    "scaled_fp8_quant",
    "select_ops",
    "silu_and_mul",
    "swap_blocks",
    "topk_softmax",
    "unified_attention",
    "w4a16_gemm",
    "w8a16_gemm",
]
