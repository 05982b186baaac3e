"""Quantised weights on a CPU with compiled ops: also those of the vocabulary."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bench.quality import TEXT, form_settings, mean_negative_logprob
from cpu_levels import library_rounds_inputs_to_bfloat16
from scalellm.kernels import Capability, Ops, select_ops
from scalellm.services.executor.build import build_engine
from scalellm.services.executor.engine.engine import Engine
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import SamplingParams
from scalellm.services.executor.models import ModelRuntime, Quantization
from scalellm.services.executor.weights import load_model, read_model_config, weight_bytes
from scalellm.services.tokenizer.text.loading import load_model_tokenizer

CPU = torch.device("cpu")
TOKENS = torch.randint(211, (40,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def ops() -> Ops:
    chosen = select_ops(Capability.of(CPU), dtype=torch.float32)
    if chosen.backends["w8a16_gemm"] != "cpp":
        pytest.skip("there is no compiler")
    return chosen


@pytest.mark.parametrize("family", ["llama-tied-bias", "qwen3"])
@pytest.mark.parametrize(("method", "high"), [("int8", 0.03), ("int4", 0.4)])
def test_models(
    ops: Ops,
    family: str,
    method: Any,
    high: float,
    hf_model: Callable[..., Any],
    paged: Callable[..., Any],
    tmp_path: Path,
) -> None:
    oracle = hf_model(family, num_hidden_layers=2)
    oracle.save_pretrained(tmp_path)
    runtime = ModelRuntime(ops, quantization=Quantization(method))
    model, config = load_model(tmp_path, runtime, max_model_len=64)
    assert weight_bytes(read_model_config(tmp_path), runtime, max_model_len=64) == model.num_bytes()
    vocabulary = [slot for slot in model.weight_slots() if "embed_tokens" in slot.name or "lm_head" in slot.name]
    assert len(vocabulary) == 2 - config.tie_word_embeddings
    for slot in vocabulary:
        assert slot.num_bytes < 1.5 * config.vocab_size * config.hidden_size

    ours = paged(model, config)
    got = torch.cat([ours.step({0: TOKENS[:-2]})[0], *(ours.step({0: [token]})[0] for token in TOKENS[-2:])])
    with torch.inference_mode():
        expected = oracle(torch.tensor([TOKENS])).logits[0]
    assert 0 < (got - expected).norm() / expected.norm() < high


@pytest.mark.parametrize("family", ["llama-tied-bias", "qwen2", "gemma3", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_kept(
    ops: Ops,
    family: str,
    dtype: torch.dtype,
    hf_model: Callable[..., Any],
    paged: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """transformers computes with the same numbers in float32. A row alone is bit by bit that of many."""
    hf_model(family, head_dim=16).to(dtype).save_pretrained(tmp_path)  # the C++ attention takes multiples of 16
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    sizes = [load_model(tmp_path, ModelRuntime(ops, quantization=Quantization(kind)), max_model_len=64)[0].num_bytes()
             for kind in ("keep", "none")]  # fmt: skip
    runtime = ModelRuntime(ops, quantization=Quantization("keep"))
    model, config = load_model(tmp_path, runtime, max_model_len=64)
    assert weight_bytes(read_model_config(tmp_path), runtime, max_model_len=64) == model.num_bytes()
    assert sizes[0] < 0.6 * sizes[1]

    ours = paged(model, config, num_sequences=2)
    got = torch.cat([ours.step({0: TOKENS[:-2]})[0], *(ours.step({0: [token]})[0] for token in TOKENS[-2:])])
    with torch.inference_mode():
        expected = oracle(torch.tensor([TOKENS])).logits[0]
    assert ops.library is not None
    if dtype == torch.bfloat16 and library_rounds_inputs_to_bfloat16(ops.library):
        assert (got - expected).norm() / expected.norm() < 0.02
    else:
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert torch.equal(ours.step({1: TOKENS})[1], got)


def test_experts_of_a_layer_that_have_several_dtypes_are_widened(
    ops: Ops, hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    """One op multiplies all of them."""
    hf_model("mixtral", head_dim=16).bfloat16().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".layers.1." in name and ".experts.1." in name)
    save_file(tensors | {name: tensors[name].half()}, file, metadata={"format": "pt"})
    model, _ = load_model(tmp_path, ModelRuntime(ops, quantization=Quantization("keep")), max_model_len=64)
    for layer, dtype in ((0, torch.bfloat16), (1, torch.float32)):
        of_layer = [slot for slot in model.weight_slots() if f".layers.{layer}." in slot.name]
        assert {slot.dest.dtype for slot in of_layer if ".experts." in slot.name} == {dtype}


@pytest.mark.slow
def test_int8_and_kept_blocks_are_within_a_percent(ops: Ops, model_dir: Callable[[str], Path]) -> None:
    """Among a quarter as many tokens, chance alone is more than that."""
    path = model_dir("smollm2-135m-instruct")
    tokens = load_model_tokenizer(path).tokenizer.encode(TEXT.read_text()[:16000]).ids
    losses = {
        form: mean_negative_logprob(build_engine(form_settings(str(path), form), lambda _: None).engine, tokens, 500)
        for form in ("float32", "int8", "keep")
    }
    assert abs(math.expm1(losses["int8"] - losses["float32"])) < 0.01
    assert abs(math.expm1(losses["keep"] - losses["float32"])) < 0.01


@pytest.mark.slow
def test_answers_do_not_depend_on_neighbours_or_preemption(ops: Ops, model_dir: Callable[[str], Path]) -> None:
    """Beside others a sequence gets the same numbers, bit by bit. So does one that was preempted and is computed
    anew, as a prompt: products and attention add up in one order.
    """
    path = model_dir("smollm2-135m-instruct")
    tokens = load_model_tokenizer(path).tokenizer.encode(TEXT.read_text()[:16000]).ids
    prompts = [tuple(tokens[start : start + 20 + start % 7]) for start in range(0, 480, 60)]
    settings = form_settings(str(path), "int8")
    crowded = settings.model_copy(update={"kv_cache_memory": None, "num_blocks": 12, "max_model_len": 64})
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)

    def answers(engine: Engine, first: int, last: int) -> list[list[int]]:
        got: list[list[int]] = [[] for _ in range(first, last)]
        for number in range(first, last):
            engine.add(EngineRequest((0, number), str(number), prompts[number], sampling))
        while engine.has_unfinished():
            result = engine.step()
            assert result.error is None
            for new in result.tokens:
                got[new.key[1] - first] += new.token_ids
        return got

    engine = build_engine(settings, lambda _: None).engine
    alone = [answers(engine, number, number + 1)[0] for number in range(len(prompts))]
    full = build_engine(crowded, lambda _: None).engine
    assert answers(engine, 0, len(prompts)) == alone
    assert answers(full, 0, len(prompts)) == alone
    assert full.stats().preemptions > 0
