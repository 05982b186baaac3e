"""Models that ranks hold together: the same numbers as on one rank, whatever the family and the division."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ranks_kit import FakeCollectives, assert_ranks_make_up, fake_shards, run_ranks
from runner_kit import MODEL
from scalellm.services.executor.models import CausalLM, ModelRuntime, Quantization, UnsupportedModelError
from scalellm.services.executor.models.shard import Part, Shard
from scalellm.services.executor.weights import load_model, read_model_config, weight_bytes

TOKENS = torch.randint(211, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def load(path: Path, shard: Shard | None = None, quantization: Quantization | None = None) -> CausalLM:
    runtime = ModelRuntime(shard=shard or Shard(), quantization=quantization or Quantization())
    return load_model(path, runtime, max_model_len=64)[0]


def on_ranks(shards: list[Shard], path: Path, paged: Callable[..., Any]) -> Tensor:
    """Return the logits of a prompt and a decode, which all ranks agree on, computed by ranks."""

    def run(shard: Shard) -> Tensor:
        model = load(path, shard)
        steps = paged(model, model.rank_config)
        logits = torch.cat([steps.step({0: tokens})[0] for tokens in (TOKENS[:-1], TOKENS[-1:])])
        ids = model.most_likely(logits)
        logits = model.joined(logits)
        assert torch.equal(ids, logits.argmax(1))
        return logits

    first, *others = run_ranks(shards, run)
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.mark.parametrize(("size", "experts"), [(2, 1), (2, 2), (6, 3)])
def test_families(
    family: str, size: int, experts: int, hf_model: Callable[..., Any], paged: Callable[..., Any], tmp_path: Path
) -> None:
    """With six ranks, three share each key and value head, and two share each expert."""
    options: dict[str, Any] = {"intermediate_size": 96, "num_hidden_layers": 2}
    if family == "gemma3":
        options["layer_types"] = ["sliding_attention", "full_attention"]
    is_mixture = family in ("mixtral", "qwen3-moe")
    if is_mixture:
        options |= {"mixtral": {"num_local_experts": 6}, "qwen3-moe": {"num_experts": 6, "moe_intermediate_size": 32}}[
            family
        ]
    elif experts > 1:
        experts = 1
    hf_model(family, **options).save_pretrained(tmp_path)
    whole = load(tmp_path)
    steps = paged(whole, whole.config)
    expected = torch.cat([steps.step({0: tokens})[0] for tokens in (TOKENS[:-1], TOKENS[-1:])])
    got = on_ranks(fake_shards(size, experts), tmp_path, paged)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert_ranks_make_up(whole, [load(tmp_path, shard) for shard in fake_shards(size, experts)])


def test_memory_is_counted_by_rank(hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("mixtral", num_local_experts=4, num_hidden_layers=2).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    counted = [weight_bytes(config, ModelRuntime(shard=shard), max_model_len=64) for shard in fake_shards(2, 2)]
    assert counted == [load(tmp_path, shard).num_bytes() for shard in fake_shards(2, 2)]
    assert max(counted) < 0.6 * weight_bytes(config, ModelRuntime(), max_model_len=64)


def test_uneven_shares() -> None:
    """Two shards of 80 inner features in pieces of 16, and of 211 tokens, are uneven."""
    shards = [Shard(rank, 2) for rank in range(2)]
    assert [shard.inner("mlp", 80, 16) for shard in shards] == [Part(0, 32, 80), Part(32, 80, 80)]
    assert list(shards[0].vocabulary(211)) == [Part(0, 105, 211), Part(105, 211, 211)]
    assert list(shards[0].vocabulary(200)) == [Part(0, 96, 200), Part(96, 200, 200)]


def test_of_equal_logits_the_lowest_token_is_taken() -> None:
    """Across ranks as within one."""
    logits = torch.zeros(3, 97)
    logits[0, [10, 60]] = 5.0  # on both ranks
    logits[1, 60:70] = 1.0
    logits[2] = -1.0
    shards = fake_shards(2)

    def run(shard: Shard) -> tuple[Tensor, Tensor]:
        model = CausalLM(MODEL, ModelRuntime(shard=shard))
        own = shard.vocabulary(97)[shard.rank]
        part = logits[:, own.start : own.stop].contiguous()
        return model.most_likely(part), model.joined(part)

    for ids, joined in run_ranks(shards, run):
        assert ids.tolist() == [10, 60, 0]
        assert torch.equal(joined, logits)
    assert isinstance(shards[0].collectives, FakeCollectives)
    assert shards[0].collectives.num_bytes == 3 * 16 + 3 * 49 * 4  # value and id of each row, or all logits


@pytest.mark.parametrize("quantization", [Quantization("int8", group_size=16), Quantization("int4", group_size=16)])
def test_quantised_on_load(quantization: Quantization, hf_model: Callable[..., Any], tmp_path: Path) -> None:
    hf_model("llama", num_hidden_layers=1, head_dim=16).save_pretrained(tmp_path)
    ranks = [load(tmp_path, shard, quantization) for shard in fake_shards(2)]
    assert assert_ranks_make_up(load(tmp_path, quantization=quantization), ranks) >= 7 * 2


@pytest.mark.parametrize(
    ("changes", "size", "experts", "message"),
    [
        ({}, 3, 1, "tensor_parallel 3: num_attention_heads 4 is not a multiple of it"),
        (
            {"num_heads": 12, "num_kv_heads": 4},
            6,
            1,
            "tensor_parallel 6: num_key_value_heads 4 is neither a multiple nor a divisor of it",
        ),
        (
            {"intermediate_size": 48},
            4,
            1,
            "tensor_parallel 4: model.layers.0.mlp: 48 inner features can be divided only at multiples of 16",
        ),
        ({"vocab_size": 1}, 2, 1, "tensor_parallel 2: vocab_size 1 can be divided only at multiples of 1"),
        ({"architecture": "MixtralForCausalLM"}, 2, 2, "expert_parallel 2: num_experts 5 is not a multiple of it"),
        ({}, 4, 3, "expert_parallel 3 does not divide tensor_parallel, 4"),
    ],
)
def test_what_cannot_be_divided(changes: dict[str, Any], size: int, experts: int, message: str) -> None:
    config = replace(MODEL, intermediate_size=64)
    if "architecture" in changes:
        mixture = {"num_experts": 5, "num_experts_per_token": 2, "moe_intermediate_size": 32}
        changes = changes | mixture | {"sparse_layers": (True, True)}
    with pytest.raises(UnsupportedModelError) as refused:
        CausalLM(replace(config, **changes), ModelRuntime(shard=Shard(0, size, experts)))
    assert message in str(refused.value)
