"""Whole models computed through Triton forms give the logits that they give through plain torch."""

import pytest
import torch

from scalellm.kernels import Launch, Ops, select_ops, topk_softmax
from scalellm.services.executor.model_config.hf_config import config_from_hf
from scalellm.services.executor.models import (
    CausalLM,
    DecodeRows,
    ForwardContext,
    ModelRuntime,
    PrefillRows,
    allocate_kv_caches,
)
from scalellm.services.executor.models.experts import Experts
from scalellm.services.executor.models.linear import PackedLinear
from scalellm.services.executor.models.quantization import Quantization
from scalellm.services.executor.models.shard import Part
from scalellm.services.executor.models.weight_slot import finish_all

CPU = torch.device("cpu")
PAGE_SIZE = 16
SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
MODELS = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"tie_word_embeddings": True},
    "Gemma3ForCausalLM": {"sliding_window": 8, "sliding_window_pattern": 2, "final_logit_softcapping": 30.0},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [0],
    },
}


def logits_of_two_steps(config, runtime):
    """Prefill 17 and 3 tokens, then continue the first by one token, across a page, and the second by four."""
    model = CausalLM(config, runtime)
    generator = torch.Generator().manual_seed(0)
    for slot in model.weight_slots():
        around = 1.0 if slot.name.endswith("norm.weight") and not config.is_gemma else 0.0
        slot.load(around + 0.15 * torch.randn(slot.shape, generator=generator), CPU)
    caches = allocate_kv_caches(config, 8, PAGE_SIZE, dtype=runtime.dtype, device=CPU)
    for cache in caches:  # whatever is read without having been written shows
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
    table = torch.tensor([[6, 1], [3, 0]], dtype=torch.int32)
    tokens = torch.randint(config.vocab_size, (25,), generator=generator)

    def forward(tokens, rows, positions, decode, prefill):
        blocks = table[torch.tensor(rows), torch.tensor(positions) // PAGE_SIZE].long()
        positions = torch.tensor(positions)
        context = ForwardContext(positions, blocks * PAGE_SIZE + positions % PAGE_SIZE, decode, prefill)
        return model.compute_logits(model.forward(tokens, context, caches))

    lens = torch.tensor([17, 3, 18, 7], dtype=torch.int32)
    chunks = PrefillRows(torch.tensor([0, 17, 20], dtype=torch.int32), lens[:2], table, 17)
    first = forward(tokens[:20], [0] * 17 + [1] * 3, [*range(17), *range(3)], None, chunks)
    decode = DecodeRows(lens[2:3], table[:1], num_splits=2)
    chunks = PrefillRows(torch.tensor([0, 4], dtype=torch.int32), lens[3:], table[1:], 4)
    return torch.cat([first, forward(tokens[20:], [0] + [1] * 4, [17, *range(3, 7)], decode, chunks)])


@pytest.mark.parametrize(
    ("architecture", "dtype", "quantization"),
    [
        *((name, torch.float32, "none") for name in MODELS),
        *((name, torch.bfloat16, "none") for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM")),
        ("MixtralForCausalLM", torch.bfloat16, "fp8"),
        ("Qwen3MoeForCausalLM", torch.bfloat16, "int4"),
    ],
)
def test_logits(architecture, dtype, quantization, launch):
    config = config_from_hf({"architectures": [architecture], **SMALL, **MODELS[architecture]})
    ops = select_ops(launch.capability, dtype=dtype, launch=launch)
    assert ops.backends["unified_attention"] == ops.backends["fused_moe"] == "triton"
    with torch.inference_mode():
        got, expected = (
            logits_of_two_steps(config, ModelRuntime(forms, dtype, CPU, Quantization(quantization)))
            for forms in (ops, Ops())
        )
    assert expected.abs().max() > 0.5
    error = (got - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 5e-2), float(error)


class Launches(Launch):
    """Launches that are also told."""

    def __init__(self, capability):
        super().__init__(capability)
        self.names = []

    def __call__(self, kernel, *args, **options):
        self.names.append(kernel.__name__.removeprefix("_"))
        super().__call__(kernel, *args, **options)


def test_a_step_of_few_rows_takes_six_launches_in_a_layer(launch):
    launches = Launches(launch.capability)
    ops = select_ops(launch.capability, dtype=torch.bfloat16, launch=launches)
    config = config_from_hf({"architectures": ["LlamaForCausalLM"], **SMALL})
    with torch.inference_mode():
        logits_of_two_steps(config, ModelRuntime(ops, torch.bfloat16, CPU))
    of_a_step = launches.names[-1 - 2 * 7 :]  # decodes and a chunk: attention is two
    attention = ["qk_norm_rope_and_cache", "decode_split", "unified_attention"]
    product = "linear_of_few_rows"
    first = ["add_rms_norm", *attention, product, product, product]
    later = [product, *attention, product, product, product]
    assert launches.names.count(product) == 3 + 4
    assert of_a_step == [*first, *later, "add_rms_norm"], of_a_step


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_interleaved_once_they_are_loaded(bits, launch):
    ops = select_ops(launch.capability, dtype=torch.float32, launch=launch)
    matrix = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    layers = []
    for forms in (ops, Ops()):
        runtime = ModelRuntime(forms, torch.float32, CPU, Quantization(f"int{bits}", group_size=64))
        layers.append(PackedLinear("p", Part.all(256), {"a": Part.all(24)}, bias=False, stored=None, runtime=runtime))
        slots = list(layers[-1].weight_slots())
        slots[0].load(matrix, CPU)
        finish_all(slots)
        finish_all(slots)  # has no effect
    interleaved, plain = (layer._weight for layer in layers)
    assert not torch.equal(interleaved.words, plain.words)
    got, expected = (layer(x) for layer in layers)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    some = torch.tensor([5, 0, 23])
    assert torch.equal(interleaved.rows(some), plain.rows(some))


@pytest.mark.parametrize(("bits", "inner", "is_interleaved"), [(4, 256, True), (8, 64, True), (4, 64, False)])
def test_packed_experts_are_interleaved_once_they_are_loaded(bits, inner, is_interleaved, launch):
    """Both products are interleaved or none is: 64 inputs with 4 bits are only eight words."""
    moe = {"num_local_experts": 3, "hidden_size": 128, "intermediate_size": inner}
    config = config_from_hf({"architectures": ["MixtralForCausalLM"], **SMALL, **moe})
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 128, generator=generator)
    weights, ids = topk_softmax(torch.randn(5, 3, generator=generator), 2, True)
    matrices, results, stacks = {}, [], []
    for forms in (select_ops(launch.capability, dtype=torch.float32, launch=launch), Ops()):
        runtime = ModelRuntime(forms, torch.float32, CPU, Quantization(f"int{bits}", group_size=32))
        experts = Experts("p", ("w1", "w3", "w2"), config, runtime)
        slots = list(experts.weight_slots())
        for slot in slots:
            slot.load(matrices.setdefault(slot.name, torch.randn(slot.shape, generator=generator) * 0.1), CPU)
        finish_all(slots)
        stacks.append(experts._product.keywords)
        results.append(experts(x, weights, ids))
    for name in ("w13", "w2"):
        assert torch.equal(stacks[0][name], stacks[1][name]) is not is_interleaved
    assert (results[0] - results[1]).norm() < 1e-5 * results[1].norm()
