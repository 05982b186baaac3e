"""Weights that are quantised when they are loaded: how far they move, what they weigh, and what feeds them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalellm.kernels import Ops
from scalellm.services.executor.models import ModelRuntime, Quantization, UnsupportedModelError
from scalellm.services.executor.models.linear import LinearWeight, PackedLinear, QuantisedInput
from scalellm.services.executor.models.linear.packing import pack_rows, unpack_rows
from scalellm.services.executor.models.shard import Part
from scalellm.services.executor.weights import load_model, read_model_config, weight_bytes

CPU = torch.device("cpu")
TOKENS = torch.randint(211, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def linear(quantization: Quantization, in_features: int = 256, **options: Any) -> tuple[PackedLinear, Tensor]:
    """Return a layer of two projections, filled, and the matrix that it was filled with."""
    runtime = ModelRuntime(quantization=quantization, **options)
    parts = {"a": Part.all(64), "b": Part.all(32)}
    layer = PackedLinear("layer", Part.all(in_features), parts, bias=False, stored=None, runtime=runtime)
    weight = torch.randn(96, in_features, generator=torch.Generator().manual_seed(1))
    for slot, part in zip(layer.weight_slots(), weight.split([64, 32]), strict=True):
        slot.load(part, CPU)
    return layer, weight


@pytest.mark.parametrize(
    ("quantization", "low", "high"),
    [
        # Rounding has an error of a step / sqrt(12); a step is the largest of a group, 2 or 3 sigma, by 8 or by 128.
        (Quantization("int8"), 0.004, 0.008),
        (Quantization("int4"), 0.09, 0.12),
        (Quantization("int4", group_size=32), 0.07, 0.09),
        # Three bits of mantissa: up to 1/16, on average a quarter of that or so.
        (Quantization("fp8"), 0.02, 0.03),
        (Quantization("fp8", granularity="tensor"), 0.02, 0.03),
    ],
)
def test_error_of_the_weight(quantization: Quantization, low: float, high: float) -> None:
    layer, weight = linear(quantization)
    eye = torch.eye(256)  # one number per token, so that inputs are exact in fp8 as well
    error = (layer(eye).T - weight).norm() / weight.norm()
    assert low < error < high


def test_integers_keep_the_largest_of_a_group_and_zeros() -> None:
    layer, weight = linear(Quantization("int4", group_size=64))
    got = layer(torch.eye(256)).T.reshape(96, 4, 64)
    expected = weight.view(96, 4, 64)
    at = expected.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(got.gather(-1, at), expected.gather(-1, at))
    (slot, _) = layer.weight_slots()
    slot.load(torch.zeros(64, 256), CPU)
    assert not layer(torch.eye(256))[:, :64].any()


def test_four_bits_find_the_numbers_that_blocks_had() -> None:
    """Weights are dequantised Q4_1 blocks of a GGUF file, and groups of equal numbers."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(16, (96, 8, 32), generator=generator).float()
    numbers[..., 0], numbers[..., 1] = 0, 15
    weight = numbers * torch.rand(96, 8, 1, generator=generator) - torch.randn(96, 8, 1, generator=generator)
    weight[5, 2], weight[6, 3] = -0.25, 0.0
    layer, _ = linear(Quantization("int4", group_size=32))
    for slot, part in zip(layer.weight_slots(), weight.flatten(1).split([64, 32]), strict=True):
        slot.load(part, CPU)
    torch.testing.assert_close(layer(torch.eye(256)).T, weight.flatten(1), rtol=0, atol=1e-5)


@settings(max_examples=50)
@given(bits=st.sampled_from([4, 8]), words=st.integers(1, 5), columns=st.integers(1, 7), seed=st.integers(0, 99))
def test_packing(bits: int, words: int, columns: int, seed: int) -> None:
    numbers = torch.randint(1 << bits, (words * 32 // bits, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_rows(numbers, bits)
    assert torch.equal(unpack_rows(packed, bits).long(), numbers)
    first = sum(int(numbers[i, 0]) << (bits * i) for i in range(32 // bits))
    assert int(packed[0, 0]) % (1 << 32) == first


def test_group_sizes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        linear(Quantization("int4"), in_features=80)
    assert "layer.a: 80 input features are quantised in groups of 16" in caplog.text
    with pytest.raises(UnsupportedModelError, match=r"layer\.a has 36 input features, .* multiple of 8"):
        linear(Quantization("int4"), in_features=36)
    with pytest.raises(ValueError, match="group_size is 0; it must be positive"):
        Quantization("int4", group_size=0)


# Every token takes all experts: which ones it takes may hang on a rounding error.
_OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3": {"layer_types": None},
    "mixtral": {"num_experts_per_tok": 5},
    "qwen3-moe": {"num_experts_per_tok": 7},
}


@pytest.mark.parametrize("family", ["llama-tied-bias", "gemma3", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize(("method", "high"), [("fp8", 0.15), ("int8", 0.02), ("int4", 0.4), ("keep", 1e-6)])
def test_models(
    family: str, method: Any, high: float, hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    oracle = hf_model(family, num_hidden_layers=2, **_OPTIONS.get(family, {}))
    oracle.save_pretrained(tmp_path)
    runtime = ModelRuntime(quantization=Quantization(method))
    reports: list[tuple[int, int]] = []
    model, config = load_model(
        tmp_path, runtime, max_model_len=64, on_progress=lambda done, total: reports.append((done, total))
    )
    assert reports[-1][0] == reports[-1][1] == sum(slot.num_bytes for slot in model.weight_slots())
    assert weight_bytes(read_model_config(tmp_path), runtime, max_model_len=64) == model.num_bytes()
    smaller = model.num_bytes() < weight_bytes(config, ModelRuntime(), max_model_len=64)
    assert smaller == (method != "keep")

    ours = paged(model, config)
    got = torch.cat([ours.step({0: TOKENS[:-2]})[0], *(ours.step({0: [token]})[0] for token in TOKENS[-2:])])
    with torch.inference_mode():
        expected = oracle(torch.tensor([TOKENS])).logits[0]
    assert (got - expected).norm() / expected.norm() < high


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_inputs_are_quantised_where_they_are_computed(
    family: str, hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    """Only the product after attention, of a layer's four, needs a launch of its own to quantise its input."""
    hf_model(family, num_hidden_layers=4).save_pretrained(tmp_path)
    calls = 0

    class CountingOps(Ops):
        def scaled_fp8_quant(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            nonlocal calls
            calls += 1
            return Ops.scaled_fp8_quant(*args, **kwargs)

    runtime = ModelRuntime(CountingOps(), quantization=Quantization("fp8"))
    model, config = load_model(tmp_path, runtime)
    fused = paged(model, config).step({0: TOKENS})[0]
    assert calls == 4

    plain, _ = load_model(tmp_path, runtime)
    for weight in linear_weights(plain):
        weight.input_from = lambda op, *args, **kwargs: op(*args, **kwargs)  # type: ignore[method-assign]
    assert torch.equal(paged(plain, config).step({0: TOKENS})[0], fused)
    assert calls == 4 + 16


def linear_weights(model: Any) -> list[LinearWeight]:
    layers = model._layers
    projections = [(x.self_attn.qkv_proj, x.self_attn.o_proj, x.mlp.gate_up_proj, x.mlp.down_proj) for x in layers]
    return [projection._weight for layer in projections for projection in layer]


def test_an_input_quantised_on_the_way_is_the_same() -> None:
    layer, _ = linear(Quantization("fp8"))
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(2))
    on_the_way = layer.input_from(Ops.silu_and_mul, x)
    assert isinstance(on_the_way, QuantisedInput)
    assert torch.equal(layer(on_the_way), layer(Ops.silu_and_mul(x)))


@pytest.mark.parametrize("method", ["none", "fp8"])
def test_the_op_before_a_product_is_told_of_the_weight(method: Literal["none", "fp8"]) -> None:
    layer, _ = linear(Quantization(method))
    told = []

    class Spy(Ops):
        @staticmethod
        def silu_and_mul(*args: Any, **kwargs: Any) -> Tensor:
            told.append(kwargs["ahead"])
            return Ops.silu_and_mul(*args, **kwargs)

    layer.input_from(Spy.silu_and_mul, torch.zeros(2, 512))
    weight: Any = layer._weight
    assert told == [weight.weight if method == "none" else weight.codes]


def test_the_runtime_decides_the_dtype() -> None:
    for method in ("none", "fp8", "int8", "int4"):
        layer, _ = linear(Quantization(method), dtype=torch.bfloat16)
        assert layer(torch.randn(3, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("fast", [False, True])
def test_products_of_e4m3_are_told_how_to_add_up(fast: bool) -> None:
    asked = []

    class Spy(Ops):
        @staticmethod
        def fp8_gemm(*args: Any, **kwargs: Any) -> Tensor:
            asked.append(kwargs["fast_sums"])
            return Ops.fp8_gemm(*args, **kwargs)

    layer, _ = linear(Quantization("fp8"), ops=Spy(), fp8_fast_sums=fast)
    layer(torch.eye(256))
    assert asked == [fast]
