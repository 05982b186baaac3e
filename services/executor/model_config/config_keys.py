"""Reading of a model's configuration such that no key is ignored: each is read, known to be irrelevant, or refused.

An ignored key could change every number that the model computes, although its answers would still look fluent.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from scalellm.services.common.model_files import shown
from scalellm.services.executor.model_config.errors import UnsupportedModelError

MOST_SIZE = 1 << 24
"""Largest dimension of a tensor."""
MOST_HEADS = 1 << 16
"""Most heads, and the widest."""
MOST_POSITIONS = (1 << 31) - 1
"""Longest context."""
MOST_LAYERS = 1024
"""Most layers. Only a damaged file has more, and each layer takes memory before anything is loaded."""


class ConfigKeys:
    """Typed access to one object of a configuration, which remembers the keys that were read.

    A null is an absent key. Each method raises UnsupportedModelError, naming key and value, for a value of another
    type or out of range.

    Args:
        values: The object.
        where: Its name in messages: the file, and the key where it lies in another object.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()
        self._parts: dict[str, ConfigKeys | None] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of any type."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Return whether the key exists, even if its value is null."""
        self._read.add(key)
        return key in self._values

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST_SIZE) -> int:
        """Return an integer. A list of equal integers, one per layer, counts as one."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            kind = "a positive" if least == 1 else "an" if least < 0 else f"at least {least}, an"
            raise self.refusal(key, f"it must be {kind} integer")
        if value > most:
            raise self.refusal(key, f"at most {most} is supported")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = False) -> float:
        """Return a finite number."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refusal(key, "it must be a number")
        if abs(value) > 1e30 or math.isnan(value) or (positive and value < 1e-30):
            raise self.refusal(key, f"it must be a {'positive ' if positive else ''}number that float32 can hold")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "it must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, "it must be a string")
        return value

    def items(self, key: str, kind: type) -> list[Any]:
        """Return a list whose entries are all of a type; an absent one is empty."""
        value = self.get(key, [])
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.refusal(key, f"it must be a list of {kind.__name__}")
        return value

    def part(self, key: str) -> "ConfigKeys | None":
        """Return an object within this one, None where it is absent or empty; its keys have to be read as well."""
        if key not in self._parts:
            value = self.get(key)
            if value is not None and not isinstance(value, Mapping):
                raise self.refusal(key, "it must be an object")
            self._parts[key] = ConfigKeys(value, f"{self._where}: {key}") if value else None
        return self._parts[key]

    def refusal(self, key: str, why: str) -> UnsupportedModelError:
        """Return the error for a key's value."""
        return UnsupportedModelError(f"{self._where}: {key} is {shown(self._values.get(key))}; {why}")

    def refuse_unread(
        self, irrelevant: Collection[str], accepted: Mapping[str, tuple[Any, ...]], *, prefix: str = ""
    ) -> None:
        """Raise UnsupportedModelError for a key that was not read and may change the model's results.

        Args:
            irrelevant: Keys that do not affect the results.
            accepted: Values with which an unread key does not affect the results.
            prefix: Prefix of the keys to check.
        """
        for key in self._values:
            name = key.removeprefix(prefix)
            if key in self._read or name in irrelevant or not key.startswith(prefix):
                continue
            if (value := self._values[key]) is None:
                continue
            supported = accepted.get(name)
            if supported is None:
                raise self.refusal(key, "this key is not known here, and it may change what the model computes")
            if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in supported):
                raise self.refusal(key, f"supported: {', '.join(map(repr, supported))}")
        for part in self._parts.values():
            if part is not None:
                part.refuse_unread(irrelevant, accepted)


IRRELEVANT_KEYS = frozenset(
    {
        # Kind of the file, and the software that wrote or reads it.
        *(
            "_name_or_path",
            "_model_name_or_path",
            "name_or_path",
            "_commit_hash",
            "transformers_version",
            "tokenizer_class",
            "auto_map",
        ),
        *(
            "torch_dtype",
            "dtype",
            "use_bfloat16",
            "unsloth_version",
            "unsloth_fixed",
            "model_name",
            "license",
            "language",
        ),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled"),
        *(
            "use_flash_attention",
            "use_flash_attn",
            "flash_attention",
            "cache_implementation",
            "use_cache",
            "torchscript",
        ),
        *("finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "prefix"),
        *("transformers.js_config", "_experts_implementation", "pretraining_tp", "base_model_tp_plan", "is_decoder"),
        # Settings of training.
        *(
            "initializer_range",
            "initializer_factor",
            "attention_dropout",
            "hidden_dropout",
            "resid_pdrop",
            "embd_pdrop",
        ),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "embedding_dropout", "residual_dropout"),
        *("classifier_dropout", "gradient_checkpointing", "router_aux_loss_coef", "router_jitter_noise"),
        *("output_router_logits", "max_sequence_length", "max_seq_len", "seq_length", "model_max_length", "seq_len"),
        # Tokens, read by the tokenizer and by services/common/end_tokens.py, and settings of transformers' generation.
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "cls_token_id",
            "unk_token_id",
            "mask_token_id",
        ),
        *(
            "decoder_start_token_id",
            "bos_token",
            "eos_token",
            "pad_token",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ),
        *(
            "do_sample",
            "max_length",
            "min_length",
            "max_new_tokens",
            "num_beams",
            "num_beam_groups",
            "diversity_penalty",
        ),
        *("repetition_penalty", "length_penalty", "early_stopping", "no_repeat_ngram_size", "num_return_sequences"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
        *("return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores"),
        *(
            "output_past",
            "chunk_size_feed_forward",
            "tf_legacy_loss",
            "tie_encoder_decoder",
            "ignore_keys_at_rope_validation",
        ),
    }
)
"""Keys of a config.json that do not change what a decoder of these architectures computes from token ids."""

ACCEPTED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attn_logit_softcapping": (0.0,),
    "decoder_sparse_step": (1,),
    "final_logit_softcapping": (0.0,),
    "hidden_act": ("gelu_pytorch_tanh",),
    "hidden_activation": ("silu",),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "partial_rotary_factor": (1, 1.0),
    "pruned_heads": ({},),
    "quantization_config": ({},),
    "compression_config": ({},),
    "rope_interleaved": (False,),
    "rope_parameters": ({},),
    "rope_scaling": ({},),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qkv_bias": (False,),
    "use_sliding_window": (False,),
    # Scaled rotary embeddings: yarn's and longrope's.
    "attention_factor": (1, 1.0),
}
"""Values of keys that an architecture does not use, with which they describe what it does anyway."""

IRRELEVANT_GGUF_KEYS = frozenset(
    {
        *("vocab_size", "tensor_data_layout", "source.url", "rope.scaling.finetuned"),
        # Keys of yarn alone, which are read with it.
        *("rope.scaling.original_context_length", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast"),
        *("rope.scaling.yarn_beta_slow", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_log_multiplier"),
    }
)
"""Keys under `<architecture>.` that do not change what a decoder of these architectures computes."""

ACCEPTED_GGUF_VALUES: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "use_parallel_residual": (False,),
}
"""Values of unread keys with which they describe what the decoder does anyway."""
