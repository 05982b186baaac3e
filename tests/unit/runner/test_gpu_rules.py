"""Rules whose violation makes a GPU slow or fail: late compiles, and values that the host reads from the device.

Nothing is compiled here, and kernels do nothing.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

import engine_kit
from runner_kit import CPU, MODEL
from scalellm.kernels import Capability, select_ops
from scalellm.services.executor.engine import Engine
from scalellm.services.executor.models import CausalLM, ModelConfig, ModelRuntime, Quantization, allocate_kv_caches
from scalellm.services.executor.runner import FakeCudaDevice, ModelRunner
from scalellm.services.executor.runner.warm_up import run_largest_step, warm_up

E4M3 = torch.float8_e4m3fn
LLAMA = replace(
    MODEL,
    vocab_size=3000,
    hidden_size=256,
    intermediate_size=256,
    head_dim=64,
    max_position_embeddings=1024,
)
GEMMA = replace(
    LLAMA,
    architecture="Gemma3ForCausalLM",
    activation="gelu_tanh",
    qk_norm=True,
    sliding_window=40,
    sliding_layers=(True, False),
    attention_softcap=30.0,
)
WIDE_GROUP = replace(LLAMA, num_heads=16, num_kv_heads=1)
MIXTURE = replace(
    LLAMA,
    architecture="MixtralForCausalLM",
    num_experts=8,
    num_experts_per_token=3,
    moe_intermediate_size=128,
    sparse_layers=(True, True),
)


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args: None

    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: Compiled())


@pytest.fixture
def zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make new tensors zero: no kernel runs here that would write their values."""

    def zeros(*shape: Any, memory_format: object = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*shape, **options)

    def zeros_like(tensor: torch.Tensor, memory_format: object = None, **options: Any) -> torch.Tensor:
        return torch.zeros_like(tensor, **options)

    monkeypatch.setattr(torch, "empty", zeros)
    monkeypatch.setattr(torch, "empty_like", zeros_like)


class MetaDevice(FakeCudaDevice):
    """A device whose memory has no content: reading it on the host, or mixing it with memory of the host, raises."""

    def __init__(self, capability: Capability) -> None:
        super().__init__(capability)
        self.torch_device = torch.device("meta")

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device == CPU
        return tensor.to("meta")

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device == self.torch_device
        return torch.full(tensor.shape, tensor.dtype == torch.bool, dtype=tensor.dtype)


def traffic(config: Any, count: int, rng: random.Random) -> list[Any]:
    requests = []
    for number in range(count):
        options: dict[str, Any] = {"temperature": rng.choice((0.0, 1.0)), "n": rng.choice((1, 1, 1, 2, 3))}
        for name, values in (
            ("logprobs", (0, 1, config.max_logprobs)),
            ("prompt_logprobs", (0, 2)),
            ("presence_penalty", (0.3,)),
            ("repetition_penalty", (1.3,)),
            ("logit_bias", ({1: 2.0},)),
            ("min_tokens", (1,)),
        ):
            if rng.random() < 0.25:
                options[name] = rng.choice(values)
        longest = rng.choice((3, 30, config.max_model_len // 4, config.max_model_len - 12))
        prompt = [rng.randrange(5) for _ in range(rng.randint(1, longest))]
        options |= {"max_tokens": rng.randint(1, 10), "ignore_eos": True, "seed": number}
        requests.append(engine_kit.make_request(number, prompt, **options))
    # Samples take all rows but one, and then leave a prompt one place in each step.
    rows, most = config.max_num_seqs - 1, 16
    for n in (*[most] * (rows // most), rows % most):
        requests.append(engine_kit.make_request(len(requests), [1] * 7, n=n, max_tokens=80, ignore_eos=True))
    requests.append(engine_kit.make_request(len(requests), [1] * 20, max_tokens=2, ignore_eos=True))
    return requests


def serve(
    model: ModelConfig,
    quantization: Any,
    cache_dtype: torch.dtype,
    limits: dict[str, int],
    *,
    device: FakeCudaDevice,
    count: int,
) -> ModelRunner:
    """Warm up a runner and put traffic to it."""
    ops = select_ops(device.capability, dtype=torch.bfloat16, kv_cache_dtype=cache_dtype)
    runtime = ModelRuntime(ops, torch.bfloat16, device.torch_device, Quantization(quantization))
    settings = {"max_model_len": 300, "max_num_seqs": 8, "max_num_batched_tokens": 128, "num_blocks": 60} | limits
    config = engine_kit.make_config(
        vocab_size=model.vocab_size, eos_token_ids=frozenset({2}), block_size=16, max_logprobs=5, **settings
    )
    weights = CausalLM(model, runtime, max_model_len=config.max_model_len)
    run_largest_step(weights, config, device, cache_dtype)
    caches = allocate_kv_caches(
        model, config.num_blocks, config.block_size, dtype=cache_dtype, device=device.torch_device, ops=ops
    )
    runner = ModelRunner(weights, caches, config, device)
    warm_up(runner, config, lambda text: None)

    rng = random.Random(f"{model.architecture} {quantization} {limits}")  # each model gets other traffic
    engine = Engine(config, runner, engine_kit.SimClock())
    for request in traffic(config, count, rng):
        engine.add(request)
        for _ in range(rng.randint(0, 4)):
            if engine.has_unfinished():
                assert engine.step().error is None
    while engine.has_unfinished():
        assert engine.step().error is None
    return runner


H200 = Capability(sm=90, num_sms=132, name="NVIDIA H200")
MODELS: dict[str, tuple[ModelConfig, str, torch.dtype, dict[str, int]]] = {
    "llama": (LLAMA, "none", torch.bfloat16, {"max_num_seqs": 24}),
    "fp8": (LLAMA, "fp8", E4M3, {"max_num_seqs": 24}),
    "int4": (LLAMA, "int4", torch.bfloat16, {}),
    "gemma": (GEMMA, "none", torch.bfloat16, {}),
    "wide-group": (WIDE_GROUP, "none", torch.bfloat16, {"max_num_batched_tokens": 8}),
    "mixture": (MIXTURE, "none", torch.bfloat16, {"max_num_batched_tokens": 256}),
    "mixture-int8": (MIXTURE, "int8", torch.bfloat16, {}),
}


def each_model(*slow: str) -> pytest.MarkDecorator:
    """Try a test on each model; on `slow` ones in `make test-all` alone, since others run the same code on the host."""
    cases = [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in slow else []) for name, case in MODELS.items()
    ]
    return pytest.mark.parametrize(("model", "quantization", "cache_dtype", "limits"), cases)


@pytest.mark.usefixtures("zeroed")
@each_model()
def test_serving_meets_no_kernel_variant_that_warm_up_did_not(
    model: ModelConfig, quantization: Any, cache_dtype: torch.dtype, limits: dict[str, int]
) -> None:
    runner = serve(model, quantization, cache_dtype, limits, device=FakeCudaDevice(H200), count=24)
    assert runner.late_compiles == []


@each_model("llama", "int4", "mixture")
def test_the_host_reads_nothing_from_the_device_and_mixes_in_nothing_of_its_own(
    model: ModelConfig, quantization: Any, cache_dtype: torch.dtype, limits: dict[str, int]
) -> None:
    device = MetaDevice(H200)
    serve(model, quantization, cache_dtype, limits, device=device, count=10)
    assert device.num_replays > 0
