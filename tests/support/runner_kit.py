"""A tiny random Llama and a runner for it."""

from dataclasses import replace

import torch

from scalellm.services.executor.engine import EngineConfig
from scalellm.services.executor.model_config.rope import RopeConfig
from scalellm.services.executor.models import CausalLM, ModelConfig, ModelRuntime, allocate_kv_caches
from scalellm.services.executor.runner import Device, ModelRunner

CPU = torch.device("cpu")
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0),
    local_rope=RopeConfig(10000.0),
    sliding_window=None,
    sliding_layers=(False, False),
    attention_scale=8**-0.5,
    qk_norm=False,
    qkv_bias=False,
    o_bias=False,
    activation="silu",
    tie_word_embeddings=False,
    embedding_scale=1.0,
    attention_softcap=0.0,
    final_softcap=0.0,
    eos_token_ids=(2,),
)


def with_experts(config: ModelConfig) -> ModelConfig:
    """Return the same with a mixture of experts in all layers but the first."""
    return replace(
        config,
        architecture="Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=80,
        norm_topk_prob=True,
        sparse_layers=(False, *[True] * (config.num_layers - 1)),
    )


def random_model(runtime: ModelRuntime | None = None) -> CausalLM:
    model = CausalLM(MODEL, runtime or ModelRuntime())
    generator = torch.Generator().manual_seed(0)
    for slot in model.weight_slots():
        slot.dest.copy_(torch.randn(slot.dest.shape, generator=generator) * 0.5)
    return model


def make_runner(model: CausalLM, config: EngineConfig, device: Device, *, capture: bool = True) -> ModelRunner:
    caches = allocate_kv_caches(
        model.config,
        config.num_blocks,
        config.block_size,
        dtype=torch.float32,
        device=device.torch_device,
        ops=model.runtime.ops,
    )
    runner = ModelRunner(model, caches, config, device)
    if capture and device.has_graphs:
        runner.capture_graphs()
    return runner
