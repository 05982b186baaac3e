"""The decoder-only language model: embedding, layers, final norm, output projection."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.context import ForwardContext, KVCache
from scalellm.services.executor.models.gemma3 import Gemma3DecoderLayer
from scalellm.services.executor.models.layers import RMSNorm
from scalellm.services.executor.models.linear import ToAdd
from scalellm.services.executor.models.llama import LlamaDecoderLayer
from scalellm.services.executor.models.rope import build_cos_sin_cache
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.vocabulary import Vocabulary
from scalellm.services.executor.models.weight_slot import WeightSlot


class CausalLM:
    """A model with uninitialised weights; `weight_slots` says what to fill them with.

    Rotary tables cover `max_model_len` positions (default: all that the model was made for). With the device `meta`
    nothing is allocated, which is used to count bytes. A rank of several holds the part in `runtime.shard`; methods are
    then called on all ranks with the same inputs.

    Attributes:
        config: of the whole model.
        rank_config: with this rank's heads, as its KV cache has them.
    """

    def __init__(self, config: ModelConfig, runtime: ModelRuntime, *, max_model_len: int | None = None) -> None:
        self.config = config
        self.rank_config = runtime.shard.config_of_rank(config)
        self.runtime = runtime
        # transformers rounds the scale to the model's dtype, and Gemma was trained that way.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=runtime.dtype).item()
        self._vocabulary = Vocabulary(config, runtime)
        num_positions = max_model_len or config.max_position_embeddings
        self._rope_tables = {
            rope: build_cos_sin_cache(rope, config.head_dim, num_positions, runtime.device)
            for rope in {config.layer_rope(layer) for layer in range(config.num_layers)}
        }
        layer_class = Gemma3DecoderLayer if config.is_gemma else LlamaDecoderLayer
        self._layers = [
            layer_class(config, layer, self._rope_tables[config.layer_rope(layer)], runtime)
            for layer in range(config.num_layers)
        ]
        # Norms are kept here and not in the layers, because a norm adds the previous layer's output to the residual
        # stream.
        self._input_norms = [RMSNorm(config.hidden_size, config, runtime) for _ in range(config.num_layers)]
        self._norm = RMSNorm(config.hidden_size, config, runtime)

    def forward(self, input_ids: Tensor, ctx: ForwardContext, kv_caches: Sequence[KVCache]) -> Tensor:
        """Return the final hidden states `[T, H]` of the new tokens `input_ids [T]` i64; fills their cache slots."""
        attended, residual = self._until_last_mix(input_ids, ctx, kv_caches)
        return self._norm(self._layers[-1].mix(attended, residual), residual)

    def forward_rows(
        self, input_ids: Tensor, ctx: ForwardContext, kv_caches: Sequence[KVCache], rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the output projection and MLP of the last layer, and the final norm, for some rows only.

        Args:
            input_ids: As `forward` takes them, like `ctx` and `kv_caches`.
            rows: `[R]` i64.

        Returns:
            The final hidden states `[R, H]` of these rows, and of all rows the last layer's attention `[T, Hq * D]` and
            the residual stream `[T, H]` before it.
        """
        attended, residual = self._until_last_mix(input_ids, ctx, kv_caches)
        if not rows.numel():
            return residual[:0], attended, residual
        kept = residual.index_select(0, rows)
        return self._norm(self._layers[-1].mix(attended.index_select(0, rows), kept), kept), attended, residual

    def _until_last_mix(
        self, input_ids: Tensor, ctx: ForwardContext, kv_caches: Sequence[KVCache]
    ) -> tuple[Tensor, Tensor]:
        """Return the last layer's attention `[T, Hq * D]` and the residual stream `[T, H]` before it."""
        residual = self._vocabulary.embed(input_ids, scale=self._embedding_scale)
        x: ToAdd = residual
        stream = None  # nothing to add before the first layer
        for norm, layer, kv in zip(self._input_norms, self._layers, kv_caches, strict=True):
            attended = layer.self_attn.attend(norm(x, stream, into=layer.self_attn.qkv_proj), ctx, kv)
            if layer is not self._layers[-1]:
                x, stream = layer.mix(attended, residual), residual
        return attended, residual

    def first_projection(self, x: Tensor) -> Tensor:
        """Return the queries, keys and values of the first layer for `x [T, H]`, a typical product of a step."""
        return self._layers[0].self_attn.qkv_proj(x)

    def compute_logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the logits `[R, V]` float32 of the hidden states `[R, H]`, in `out` where it is given.

        A rank of several gets those of its own tokens, of which there are `num_logits`; see `joined`.
        """
        logits = self._vocabulary.logits(hidden, out=out)
        softcap = self.config.final_softcap
        return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits

    @property
    def num_logits(self) -> int:
        """Logits of a row that this rank computes."""
        return self._vocabulary.own.size

    def joined(self, logits: Tensor) -> Tensor:
        """Return the logits `[R, V]` of all ranks, given this rank's."""
        return self._vocabulary.joined(logits)

    def most_likely(self, logits: Tensor) -> Tensor:
        """Return the token with the largest logit of each row, `[R]` i64, the lowest of equals, given this rank's."""
        return self._vocabulary.most_likely(logits)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield a slot for every tensor of the checkpoint, in the order in which checkpoints store them."""
        yield from self._vocabulary.embedding_slots()
        for index, (layer, norm) in enumerate(zip(self._layers, self._input_norms, strict=True)):
            yield norm.weight_slot(f"model.layers.{index}.input_layernorm")
            yield from layer.weight_slots(f"model.layers.{index}")
        yield self._norm.weight_slot("model.norm")
        yield from self._vocabulary.head_slots()

    def kv_scale_slots(self) -> Iterator[WeightSlot]:
        """Yield slots for the scales of an e4m3 cache, which few checkpoints have."""
        for layer in self._layers:
            yield from layer.self_attn.kv_scales.weight_slots()

    def num_bytes(self) -> int:
        """Return the bytes of weights and rotary tables; what is shared counts once."""
        weights = sum(slot.num_bytes for slot in self.weight_slots())
        return weights + sum(table.nbytes for table in self._rope_tables.values())
