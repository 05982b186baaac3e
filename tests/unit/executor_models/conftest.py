"""A model over a paged cache, driven by hand, and the oracle beside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from scalellm.services.executor.models import (
    CausalLM,
    DecodeRows,
    ForwardContext,
    ModelConfig,
    PrefillRows,
    allocate_kv_caches,
)

PAGE_SIZE = 16


class PagedModel:
    """Runs batches of (sequence, new tokens); every sequence owns shuffled blocks of one cache."""

    def __init__(
        self,
        model: CausalLM,
        config: ModelConfig,
        *,
        num_sequences: int = 1,
        max_tokens: int = 256,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        blocks_per_sequence = -(-max_tokens // PAGE_SIZE)
        num_blocks = num_sequences * blocks_per_sequence + 3
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(7))
        self._block_table = order[: num_sequences * blocks_per_sequence].view(num_sequences, -1).int()
        self._caches = allocate_kv_caches(
            config, num_blocks, PAGE_SIZE, dtype=kv_dtype, device=torch.device("cpu"), ops=model.runtime.ops
        )
        for tensor in (tensor for cache in self._caches for tensor in cache):
            tensor.fill_(-1 if kv_dtype == torch.int8 else torch.nan)  # what is read without having been written shows
        self._lengths = [0] * num_sequences

    def step(self, batch: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Feed each sequence its next tokens; return the logits `[new tokens, V]` of each."""
        sequences, sizes, tokens, ctx = self._inputs(batch)
        logits = self.model.compute_logits(self.model.forward(tokens, ctx, self._caches))
        return dict(zip(sequences, logits.split(sizes), strict=True))

    def step_to_last(self, batch: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Feed each sequence its next tokens; return the logits `[1, V]` of the last one of each, without computing
        those of the others.
        """
        sequences, sizes, tokens, ctx = self._inputs(batch)
        last = torch.tensor(sizes).cumsum(0) - 1
        hidden, attended, residual = self.model.forward_rows(tokens, ctx, self._caches, last)
        assert hidden.shape[0] == len(sequences)
        assert attended.shape[0] == residual.shape[0] == len(tokens)
        return dict(zip(sequences, self.model.compute_logits(hidden).split(1), strict=True))

    def _inputs(self, batch: Mapping[int, Sequence[int]]) -> tuple[list[int], list[int], Tensor, ForwardContext]:
        """Return the sequences in the order of their rows, the number of rows of each, the tokens and the context."""
        sequences = sorted(batch, key=lambda s: len(batch[s]) > 1)  # those with one new token come first
        starts = [self._lengths[s] for s in sequences]
        sizes = [len(batch[s]) for s in sequences]
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)])
        rows = torch.repeat_interleave(torch.tensor(sequences), torch.tensor(sizes))
        slots = self._block_table[rows, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        for s, n in zip(sequences, sizes, strict=True):
            self._lengths[s] += n
        seq_lens = torch.tensor([self._lengths[s] for s in sequences], dtype=torch.int32)
        tables = self._block_table[sequences]
        D = sizes.count(1)
        chunks = PrefillRows(torch.tensor([0, *sizes[D:]]).cumsum(0).int(), seq_lens[D:], tables[D:], max(sizes))
        ctx = ForwardContext(
            positions=positions,
            slot_mapping=slots,
            decode=DecodeRows(seq_lens[:D], tables[:D]) if D else None,
            prefill=chunks if len(sizes) > D else None,
        )
        tokens = torch.tensor([token for s in sequences for token in batch[s]])
        return sequences, sizes, tokens, ctx


@pytest.fixture
def paged() -> Callable[..., PagedModel]:
    return PagedModel


def random_hf_model(architecture: str, **overrides: Any) -> PreTrainedModel:
    """Return a small transformers model, float32 and eager, whose every tensor is random.

    transformers starts norms and biases at their neutral values; here they are random too, or an error in them would
    not show.
    """
    config_class, defaults = _FAMILIES[architecture]
    config = config_class(**{**_SMALL, **defaults, **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3)
            parameter.copy_(1.0 + noise if name.endswith("norm.weight") and architecture != "gemma3" else noise)
    return model


_SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"head_dim": 8, "tie_word_embeddings": False}),
    "llama-tied-bias": (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True}),
    "llama3-rope": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn-rope": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear-rope": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "mistral": (MistralConfig, {"sliding_window": 20}),
    "qwen2": (Qwen2Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": (MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 20}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            "final_logit_softcapping": 30.0,
        },
    ),
}


@pytest.fixture
def hf_model() -> Callable[..., PreTrainedModel]:
    return random_hf_model


@pytest.fixture(params=list(_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
