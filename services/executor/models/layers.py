"""The parts every decoder is made of. Projections that read the same input are packed into one matrix."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from services.executor.models.config import ModelConfig
from services.executor.models.context import ForwardContext, KVCache


class WeightSlot(NamedTuple):
    """Where one tensor of a checkpoint belongs.

    `name` is its Hugging Face name; `dest` the memory to fill, perhaps a slice of a packed matrix, of the tensor's
    shape.
    """

    name: str
    dest: Tensor


class PackedLinear:
    """y = x W^T + b, where W stacks the rows of one or more projections; `parts` maps their names to output sizes."""

    def __init__(
        self, in_features: int, parts: dict[str, int], *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._parts = parts
        out_features = sum(parts.values())
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, in]` -> `[T, out]`."""
        return F.linear(x, self.weight, self.bias)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of every part, named under `prefix`."""
        sizes = list(self._parts.values())
        for part, weight in zip(self._parts, torch.split(self.weight, sizes), strict=True):
            yield WeightSlot(f"{prefix}.{part}.weight", weight)
        if self.bias is not None:
            for part, bias in zip(self._parts, torch.split(self.bias, sizes), strict=True):
                yield WeightSlot(f"{prefix}.{part}.bias", bias)


class RMSNorm:
    """Root-mean-square norm (arXiv 1910.07467); Gemma multiplies by 1 + weight."""

    def __init__(self, size: int, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._eps = config.rms_norm_eps
        self._gemma = config.is_gemma
        self.weight = torch.empty(size, dtype=dtype, device=device)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Norm of `x [T, H]`; with a residual, which is updated in place, norm of their sum."""
        return kernels.fused_add_rms_norm(x, residual, self.weight, self._eps, gemma=self._gemma)

    def weight_slot(self, prefix: str) -> WeightSlot:
        """Return the slot of the weight."""
        return WeightSlot(f"{prefix}.weight", self.weight)


class Attention:
    """Grouped-query self-attention of one layer over the paged cache."""

    def __init__(
        self, config: ModelConfig, layer: int, cos_sin_cache: Tensor, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._scale = config.attention_scale
        self._softcap = config.attention_softcap
        self._window = config.layer_window(layer)
        self._eps = config.rms_norm_eps
        self._gemma = config.is_gemma
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = PackedLinear(
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=config.qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.o_proj = PackedLinear(
            q_size, {"o_proj": config.hidden_size}, bias=config.o_bias, dtype=dtype, device=device
        )
        self.q_norm = RMSNorm(config.head_dim, config, dtype=dtype, device=device) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config, dtype=dtype, device=device) if config.qk_norm else None
        self._cos_sin_cache = cos_sin_cache

    def __call__(self, x: Tensor, ctx: ForwardContext, kv: KVCache) -> Tensor:
        """`[T, H]` -> `[T, H]`; writes the new keys and values into `kv`."""
        q = kernels.qk_norm_rope_and_cache(
            self.qkv_proj(x),
            ctx.positions,
            self._cos_sin_cache,
            ctx.slot_mapping,
            kv.k,
            kv.v,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=self._eps,
            gemma=self._gemma,
        )
        out = kernels.unified_attention(
            q,
            kv.k,
            kv.v,
            ctx.cu_seqlens_q,
            ctx.seq_lens,
            ctx.block_table,
            max_seqlen_q=ctx.max_seqlen_q,
            scale=self._scale,
            window=self._window,
            softcap=self._softcap,
        )
        return self.o_proj(out.flatten(1))

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of the projections and norms."""
        yield from self.qkv_proj.weight_slots(prefix)
        yield from self.o_proj.weight_slots(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield self.q_norm.weight_slot(f"{prefix}.q_norm")
            yield self.k_norm.weight_slot(f"{prefix}.k_norm")


class GatedMLP:
    """down(act(gate(x)) * up(x)), SwiGLU or GeGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self._act_and_mul = kernels.silu_and_mul if config.activation == "silu" else kernels.gelu_tanh_and_mul
        self.gate_up_proj = PackedLinear(
            hidden, {"gate_proj": inner, "up_proj": inner}, bias=False, dtype=dtype, device=device
        )
        self.down_proj = PackedLinear(inner, {"down_proj": hidden}, bias=False, dtype=dtype, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, H]` -> `[T, H]`."""
        return self.down_proj(self._act_and_mul(self.gate_up_proj(x)))

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Yield the slots of the projections."""
        yield from self.gate_up_proj.weight_slots(prefix)
        yield from self.down_proj.weight_slots(prefix)
