"""Small models of zeros that load, one of each kind: what `lying_models` makes lie."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lying_gguf import ARRAY, F32, I32, STRING, U32, Gguf
from scalellm.services.executor.model_config.hf_config import config_from_hf
from scalellm.services.executor.models import CausalLM, ModelRuntime

_HIDDEN, _INNER, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM, _EXPERTS = 32, 32, 2, 4, 2, 8, 3
_END = "<|im_end|>"
_MERGES = [("H", "e"), ("l", "l"), ("He", "ll"), ("Ġ", "1")]
_SIZES = {
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": [2],
    "torch_dtype": "float32",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True, "lm_head": False}
_FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Llama", {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": _LLAMA3, "mlp_bias": False}),
    ("Llama", {"model_type": "llama", "hidden_act": "silu", "quantization_config": _FP8}),
    ("Llama", {"model_type": "llama", "pretraining_tp": 1, "quantization_config": _GPTQ, "hidden_size": 32}),
    ("Mistral", {"model_type": "mistral", "sliding_window": 16}),
    ("Qwen2", {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("Qwen3", {"model_type": "qwen3", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("Mixtral", {"model_type": "mixtral", "num_local_experts": _EXPERTS, "num_experts_per_tok": 2}),
    (
        "Qwen3Moe",
        {
            "model_type": "qwen3_moe",
            "num_experts": _EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    (
        "Gemma3",
        {
            "model_type": "gemma3_text",
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 30.0,
        },
    ),
)


def hugging_face_bases() -> list[dict[str, bytes]]:
    """Return the files of each model, by name."""
    return [_hugging_face(name, own) for name, own in _FAMILIES]


@cache
def gguf_bases() -> list[Gguf]:
    """Return the file of each model."""
    return [_gguf("llama", "gpt2"), _gguf("gemma3", "llama"), _gguf("llama", "gpt2", experts=_EXPERTS)]


def _hugging_face(name: str, own: dict[str, Any]) -> dict[str, bytes]:
    tokenizer = _sentence_piece() if name == "Gemma3" else _byte_level()
    config = {"architectures": [f"{name}ForCausalLM"], **_SIZES, "vocab_size": tokenizer.get_vocab_size(), **own}
    with_template = {"chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}
    runtime = ModelRuntime(device=torch.device("meta"))
    model = CausalLM(config_from_hf(config), runtime)
    tensors = {
        slot.name: torch.zeros(slot.shape or (1,), dtype=slot.dtypes[1 if len(slot.dtypes) > 1 else 0])
        for slot in model.weight_slots()
        if not slot.optional
    }
    documents = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.6},
        "tokenizer_config.json": {
            "eos_token": {"content": _END, "__type": "AddedToken"},
            "bos_token": "<s>",
            "model_max_length": 128,
            **with_template,
        },
    }
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):
            tensor.fill_(0x77777777)  # GPTQ's zero point of symmetric weights
    files = {name: json.dumps(document).encode() for name, document in documents.items()}
    return {**files, "tokenizer.json": tokenizer.to_str().encode(), "model.safetensors": save(tensors)}


def _byte_level() -> Tokenizer:
    tokens = ["<pad>", "<s>", _END, "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += ["".join(merge) for merge in _MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=_MERGES))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=" ", behavior="merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:4]])
    return tokenizer


def _sentence_piece_tokens() -> list[str]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    return [
        "<unk>",
        "<s>",
        _END,
        "<end_of_turn>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *letters,
        "▁a",
        "he",
        "ll",
    ]


def _sentence_piece() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(_sentence_piece_tokens())}
    merges = [("▁", "a"), ("h", "e"), ("l", "l")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", _END, "<end_of_turn>"])
    return tokenizer


def _gguf(arch: str, family: str, *, experts: int = 0) -> Gguf:
    file = Gguf()
    file.add("general.architecture", STRING, arch)
    file.add("general.alignment", U32, 32)
    numbers = {
        "block_count": _LAYERS,
        "context_length": 128,
        "embedding_length": _HIDDEN,
        "feed_forward_length": _INNER,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV_HEADS,
        "attention.key_length": _HEAD_DIM,
        "attention.value_length": _HEAD_DIM,
        "rope.dimension_count": _HEAD_DIM,
        **({"attention.sliding_window": 16} if arch == "gemma3" else {}),
        **({"expert_count": experts, "expert_used_count": 2} if experts else {}),
    }
    for key, value in numbers.items():
        file.add(f"{arch}.{key}", U32, value)
    for key, number in {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e4,
        "rope.scaling.factor": 2.0,
    }.items():
        file.add(f"{arch}.{key}", F32, number)
    vocab_size = _add_tokenizer(file, family)
    _add_tensors(file, arch, vocab_size, experts)
    return file


def _add_tokenizer(file: Gguf, family: str) -> int:
    prefix = "tokenizer.ggml."
    file.add(f"{prefix}model", STRING, family)
    if family == "gpt2":
        tokenizer = _byte_level()
        tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        types = [3] * 4 + [1] * (len(tokens) - 4)
        file.add(f"{prefix}pre", STRING, "llama-bpe")
        file.add(f"{prefix}merges", ARRAY, [" ".join(merge) for merge in _MERGES], STRING)
    else:
        tokens = _sentence_piece_tokens()
        types = [2, 3, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260)]
        file.add(f"{prefix}scores", ARRAY, [-float(i) for i in range(len(tokens))], F32)
        file.add(f"{prefix}unknown_token_id", U32, 0)
    file.add(f"{prefix}tokens", ARRAY, tokens, STRING)
    file.add(f"{prefix}token_type", ARRAY, types, I32)
    for role, token_id in {"bos": 1, "eos": 2, "eot": 3, "padding": 0}.items():
        file.add(f"{prefix}{role}_token_id", U32, token_id)
    file.add("tokenizer.chat_template", STRING, "{{ messages[0].content }}")
    return len(tokens)


def _add_tensors(file: Gguf, arch: str, vocab_size: int, experts: int) -> None:
    file.add_tensor("token_embd.weight", vocab_size, _HIDDEN)
    file.add_tensor("output_norm.weight", _HIDDEN)
    stack = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        names = {"attn_norm": (_HIDDEN,), "ffn_norm": (_HIDDEN,)}
        if arch == "gemma3":
            names |= dict.fromkeys(("post_attention_norm", "post_ffw_norm"), (_HIDDEN,))
            names |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (_HEAD_DIM,))
        if experts:
            names["ffn_gate_inp"] = (experts, _HIDDEN)
        names |= dict.fromkeys(("attn_q", "attn_output"), (_HEADS * _HEAD_DIM, _HIDDEN))
        names |= dict.fromkeys(("attn_k", "attn_v"), (_KV_HEADS * _HEAD_DIM, _HIDDEN))
        names |= {f"ffn_{part}{suffix}": (*stack, _INNER, _HIDDEN) for part in ("gate", "up", "down")}
        for name, shape in names.items():
            file.add_tensor(f"{block}.{name}.weight", *shape)
