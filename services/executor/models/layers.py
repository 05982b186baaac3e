"""The parts every decoder is made of. Projections that read the same input are packed into one matrix."""

import math
from collections.abc import Iterator
from functools import partial
from typing import overload

import torch
from torch import Tensor

from scalellm.kernels import Gate, RowNorm
from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.models.context import ForwardContext, KVCache
from scalellm.services.executor.models.linear import (
    Added,
    LinearInput,
    NormedInput,
    PackedLinear,
    ToAdd,
    inner_border,
)
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.shard import Part
from scalellm.services.executor.models.weight_slot import WeightSlot


class RMSNorm:
    """Root-mean-square norm (arXiv 1910.07467); Gemma multiplies by 1 + weight."""

    def __init__(self, size: int, config: ModelConfig, runtime: ModelRuntime) -> None:
        self._ops = runtime.ops
        self._eps = config.rms_norm_eps
        self._gemma = config.is_gemma
        self.weight = runtime.empty(size)

    @overload
    def __call__(self, x: ToAdd, residual: Tensor | None = None) -> Tensor: ...

    @overload
    def __call__(self, x: ToAdd, residual: Tensor | None = None, *, into: PackedLinear) -> LinearInput: ...

    def __call__(self, x: ToAdd, residual: Tensor | None = None, *, into: PackedLinear | None = None) -> LinearInput:
        """Norm of `x [T, H]`; with a residual, which is updated in place, norm of their sum.

        If the result is only read by the layer `into`, it is returned in the form that this layer multiplies.
        """
        if isinstance(x, Added):
            assert residual is not None
            if into is not None and into.norms_inputs(residual.shape[0]):
                return NormedInput(residual, RowNorm(x.squares, self.weight, self._eps, self._gemma))
            x, residual = residual, None
        norm = self._ops.fused_add_rms_norm
        if into is None:
            return norm(x, residual, self.weight, self._eps, gemma=self._gemma)
        return into.input_from(norm, x, residual, self.weight, self._eps, gemma=self._gemma)

    def weight_slot(self, prefix: str) -> WeightSlot:
        """Return the slot of the weight."""
        return WeightSlot(f"{prefix}.weight", self.weight)


class KVScales:
    """The scales of e4m3 keys and values in the cache of one layer; 1 where the checkpoint has none.

    `prefix` is the name of the attention layer.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._scales = {"k_scale": 1.0, "v_scale": 1.0}

    def of(self, kv: KVCache) -> tuple[float | None, float | None]:
        """Return the scales of keys and of values; None for a cache that is not quantised."""
        if kv.k.dtype != torch.float8_e4m3fn:
            return None, None
        return self._scales["k_scale"], self._scales["v_scale"]

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of the scales, under the names that checkpoints have had for them."""
        for scale in self._scales:
            projection = f"{self._prefix}.{scale[0]}_proj"
            aliases = (
                f"{projection}.{scale}",
                f"{projection}.output_scale",
                f"{self._prefix}.attn.{scale}",
                f"{self._prefix}.kv_scale",  # AutoFP8 has one for both
            )
            set_scale = partial(self._set, scale)
            yield WeightSlot(f"{self._prefix}.{scale}", shape=(), encode=set_scale, optional=True, aliases=aliases)

    def _set(self, scale: str, tensor: Tensor) -> tuple[Tensor, ...]:
        value = tensor.item()
        if not 0.0 < value < math.inf:
            raise UnsupportedModelError(f"{self._prefix}.{scale} is {value}; it must be positive and finite")
        self._scales[scale] = value
        return ()


class Attention:
    """Grouped-query self-attention of one layer over the paged cache."""

    def __init__(self, config: ModelConfig, layer: int, cos_sin_cache: Tensor, runtime: ModelRuntime) -> None:
        self._ops = runtime.ops
        self._scale = config.attention_scale
        self._softcap = config.attention_softcap
        self._window = config.layer_window(layer)
        self._eps = config.rms_norm_eps
        self._gemma = config.is_gemma
        shard = runtime.shard
        q_size, kv_size = shard.heads(config).times(config.head_dim), shard.kv_heads(config).times(config.head_dim)
        self._prefix = f"model.layers.{layer}.self_attn"
        self.kv_scales = KVScales(self._prefix)
        self.qkv_proj = PackedLinear(
            self._prefix,
            Part.all(config.hidden_size),
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            bias=config.qkv_bias,
            stored=config.stored_linears,
            runtime=runtime,
        )
        self.o_proj = PackedLinear(
            self._prefix,
            q_size,
            {"o_proj": Part.all(config.hidden_size)},
            bias=config.o_bias,
            stored=config.stored_linears,
            runtime=runtime,
        )
        self.q_norm = RMSNorm(config.head_dim, config, runtime) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config, runtime) if config.qk_norm else None
        self._cos_sin_cache = cos_sin_cache

    def attend(self, x: LinearInput, ctx: ForwardContext, kv: KVCache) -> Tensor:
        """Return the attention of all heads `[T, Hq * D]` for `x [T, H]`; writes the new keys and values into `kv`."""
        k_scale, v_scale = self.kv_scales.of(kv)
        q = self._ops.qk_norm_rope_and_cache(
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
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return self._attend(q, ctx, kv).flatten(1)

    def project(self, attended: Tensor, *, residual: Tensor | None = None) -> ToAdd:
        """Return the output `[T, H]` of `attended [T, Hq * D]`.

        With a residual, the caller only adds the result to it, so that the addition may be done here.
        """
        return self.o_proj(attended) if residual is None else self.o_proj.added(attended, residual)

    def _attend(self, q: Tensor, ctx: ForwardContext, kv: KVCache) -> Tensor:
        """Return the attention `[T, Hq, D]`, with separate ops for decodes and chunks, whose bottlenecks differ."""
        out = torch.empty_like(q)
        k_scale, v_scale = self.kv_scales.of(kv)
        num_decodes = 0
        if ctx.decode is not None:
            num_decodes = ctx.decode.seq_lens.shape[0]
            self._ops.paged_attention_decode(
                q[:num_decodes],
                kv.k,
                kv.v,
                ctx.decode.block_table,
                ctx.decode.seq_lens,
                scale=self._scale,
                num_splits=ctx.decode.num_splits,
                window=self._window,
                softcap=self._softcap,
                workspace=ctx.decode.workspace,
                out=out[:num_decodes],
                k_scale=k_scale,
                v_scale=v_scale,
            )
        if ctx.prefill is not None:
            self._ops.unified_attention(
                q[num_decodes:],
                kv.k,
                kv.v,
                ctx.prefill.cu_seqlens_q,
                ctx.prefill.seq_lens,
                ctx.prefill.block_table,
                max_seqlen_q=ctx.prefill.max_seqlen_q,
                scale=self._scale,
                window=self._window,
                softcap=self._softcap,
                out=out[num_decodes:],
                k_scale=k_scale,
                v_scale=v_scale,
            )
        return out

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of the projections and norms."""
        yield from self.qkv_proj.weight_slots()
        yield from self.o_proj.weight_slots()
        if self.q_norm is not None and self.k_norm is not None:
            yield self.q_norm.weight_slot(f"{self._prefix}.q_norm")
            yield self.k_norm.weight_slot(f"{self._prefix}.k_norm")


class GatedMLP:
    """down(act(gate(x)) * up(x)), SwiGLU or GeGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, layer: int, runtime: ModelRuntime) -> None:
        hidden, ops, stored = Part.all(config.hidden_size), runtime.ops, config.stored_linears
        prefix = f"model.layers.{layer}.mlp"
        inner = Part.all(config.intermediate_size)
        if not runtime.shard.is_whole:
            names = [f"{prefix}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
            border = inner_border(names, config.hidden_size, inner.whole, stored, runtime)
            inner = runtime.shard.inner(prefix, inner.whole, border)
        self._gate: Gate = "silu" if config.activation == "silu" else "gelu_tanh"
        self._act_and_mul = ops.silu_and_mul if self._gate == "silu" else ops.gelu_tanh_and_mul
        self.gate_up_proj = PackedLinear(
            prefix, hidden, {"gate_proj": inner, "up_proj": inner}, bias=False, stored=stored, runtime=runtime
        )
        self.down_proj = PackedLinear(prefix, inner, {"down_proj": hidden}, bias=False, stored=stored, runtime=runtime)

    def __call__(self, x: LinearInput, *, residual: Tensor | None = None) -> ToAdd:
        """`[T, H]` -> `[T, H]`; with a residual it is to be added to that alone, as in `Attention.project`."""
        inner = self.gate_up_proj.gated(x, self._gate, self._act_and_mul, self.down_proj)
        return self.down_proj(inner) if residual is None else self.down_proj.added(inner, residual)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of the projections."""
        yield from self.gate_up_proj.weight_slots()
        yield from self.down_proj.weight_slots()
