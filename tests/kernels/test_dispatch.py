"""The choice of a form for each operation, and the rules that every Triton form shares with its torch form."""

import inspect
import subprocess
import sys

import pytest
import torch

from scalellm import kernels
from scalellm.kernels import Capability, Ops, select_ops
from scalellm.kernels.dispatch import OP_NAMES

CPU, A100, H200 = Capability(sm=0, num_sms=1), Capability(sm=80, num_sms=108), Capability(sm=90, num_sms=132)
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture
def with_triton():
    pytest.importorskip("triton")


def test_every_public_function_of_a_device_is_an_op():
    helpers = {"decode_workspace", "num_decode_splits", "num_squares", "sample_seed", "select_ops"}
    helpers |= {"fused_moe_workspace_size", "gemm_wna16_workspace_size", "sample_workspace_size"}
    assert {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))} - helpers == set(OP_NAMES)


def test_without_a_device_all_ops_are_torch():
    cpu = Capability.of(torch.device("cpu"))
    for ops in (Ops(), select_ops(cpu, dtype=torch.float32, overrides={"all": "torch"})):
        assert set(ops.backends.values()) == {"torch"}
        assert ops.launch is None
        assert ops.silu_and_mul is kernels.silu_and_mul


def test_without_a_compiler_all_ops_are_torch_and_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        ops = select_ops(CPU, dtype=torch.float32, build_dir=tmp_path)
        assert set(ops.backends.values()) == {"torch"}
    assert len(caplog.records) == 1
    assert "plain torch is used instead: there is no compiler (c++, g++, clang++)" in caplog.text
    with pytest.raises(ValueError, match="silu_and_mul cannot run on cpp: it could not be compiled"):
        select_ops(CPU, dtype=torch.float32, overrides={"silu_and_mul": "cpp"}, build_dir=tmp_path)


def test_a_capable_device_gets_triton(with_triton):
    ops = select_ops(H200, dtype=BF16)
    assert ops.backends["unified_attention"] == "triton"
    assert ops.backends["swap_blocks"] == "torch"
    assert ops.launch is not None
    assert ops.launch.capability == H200


def test_an_e4m3_cache_needs_a_device_that_converts_it(with_triton):
    assert select_ops(A100, dtype=BF16).backends["unified_attention"] == "triton"
    with pytest.raises(ValueError, match="kv_cache_dtype: e4m3 needs compute capability 8.9, the device has 8.0"):
        select_ops(A100, dtype=BF16, kv_cache_dtype=E4M3)
    on_cache = ("paged_attention_decode", "qk_norm_rope_and_cache", "unified_attention")
    overrides = dict.fromkeys(on_cache, "torch")
    backends = select_ops(A100, dtype=BF16, kv_cache_dtype=E4M3, overrides=overrides).backends
    assert {backends[name] for name in on_cache} == {"torch"}
    assert backends["copy_blocks_"] == "triton"
    assert "triton" not in select_ops(CPU, dtype=BF16, kv_cache_dtype=E4M3).backends.values()


def refused_calls():
    x, scale, weight = torch.zeros(2, 16, dtype=BF16), torch.ones(2, 1), torch.ones(16, dtype=BF16)
    for options, name in (({"quant_scale": 1.0}, "quant_scale"), ({"token_scale": scale}, "token_scale")):
        yield name, lambda ops, o=options: ops.fused_add_rms_norm(x, None, weight, 1e-6, **o)
        yield name, lambda ops, o=options: ops.silu_and_mul(x, **o)
        yield name, lambda ops, o=options: ops.gelu_tanh_and_mul(x, **o)
    cache, q = torch.zeros(2, 16, 1, 16).to(E4M3), torch.zeros(2, 1, 16, dtype=BF16)
    table, lens, cu = torch.zeros(2, 1).int(), torch.ones(2).int(), torch.arange(3).int()
    slots, angles = torch.arange(2), torch.zeros(4, 16)
    caches = "k_cache, v_cache"
    yield caches, lambda ops: ops.unified_attention(q, cache, cache, cu, lens, table, max_seqlen_q=1, scale=1.0)
    yield caches, lambda ops: ops.paged_attention_decode(q, cache, cache, table, lens, scale=1.0)
    yield caches, lambda ops: ops.qk_norm_rope_and_cache(x.repeat(1, 3), slots, angles, slots, cache, cache)
    w13, w2, weights = torch.zeros(2, 32, 16).to(E4M3), torch.zeros(2, 16, 16).to(E4M3), torch.ones(2, 1)
    yield "w13, w2", lambda ops: ops.fused_moe(x, w13, w2, weights, torch.zeros(2, 1).int())


@pytest.mark.parametrize(("argument", "call"), list(refused_calls()))
def test_e4m3_is_refused_by_name_where_the_device_does_not_convert_it(with_triton, argument, call):
    ops = select_ops(A100, dtype=BF16)
    with pytest.raises(ValueError, match=f"^{argument}: e4m3 needs compute capability 8.9, the device has 8.0$"):
        call(ops)


def test_overrides(with_triton):
    assert set(select_ops(H200, dtype=BF16, overrides={"all": "torch"}).backends.values()) == {"torch"}
    backends = select_ops(H200, dtype=BF16, overrides={"all": "torch", "copy_blocks_": "triton"}).backends
    assert [name for name, backend in backends.items() if backend == "triton"] == ["copy_blocks_"]
    assert select_ops(H200, dtype=BF16, overrides={"copy_blocks_": "torch"}).backends["unified_attention"] == "triton"
    assert set(select_ops(H200, dtype=BF16, overrides={"all": "cpp"}).backends.values()) == {"torch"}


@pytest.mark.parametrize(
    ("capability", "name", "message"),
    [
        (H200, "silu_and_mul", "silu_and_mul cannot run on cpp: it is for CPUs"),
        (CPU, "swap_blocks", "swap_blocks cannot run on cpp: it has no such form"),
        (H200, "attention", "there is no op 'attention'; ops are apply_logits_processors_, "),
        (H200, "swap_blocks", "swap_blocks cannot run on triton: it has no such form"),
        (
            CPU,
            "copy_blocks_",
            r"copy_blocks_ cannot run on triton: it needs compute capability 8.0, the device has 0.0",
        ),
        (A100, "scaled_fp8_quant", r"scaled_fp8_quant cannot run on triton: it needs compute capability 8.9"),
    ],
)
def test_impossible_overrides_are_refused(capability, name, message):
    with pytest.raises(ValueError, match=message):
        select_ops(capability, dtype=BF16, overrides={name: "cpp" if "cpp" in message else "triton"})


def test_importing_kernels_does_not_import_triton():
    code = "import sys; sys.modules['triton'] = None; from scalellm import kernels; kernels.select_ops"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_forms_have_the_signatures_of_the_torch_forms(with_triton):
    ops = select_ops(H200, dtype=BF16)
    for name in OP_NAMES:
        if ops.backends[name] == "triton":
            assert str(inspect.signature(getattr(ops, name))) == str(inspect.signature(getattr(Ops, name))), name
