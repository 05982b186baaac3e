"""Which forms are chosen, and what every Triton form keeps of its torch form."""

import inspect
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import Capability, Ops, select_ops
from kernels.dispatch import OP_NAMES

CPU, A100, H200 = Capability(sm=0, num_sms=1), Capability(sm=80, num_sms=108), Capability(sm=90, num_sms=132)
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture
def with_triton():
    pytest.importorskip("triton")


def test_every_public_function_of_a_device_is_an_op():
    helpers = {"decode_workspace", "num_decode_splits", "sample_seed", "select_ops"}
    helpers |= {"fused_moe_workspace_size", "gemm_wna16_workspace_size", "sample_workspace_size"}
    assert {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))} - helpers == set(OP_NAMES)


def test_without_cuda_all_ops_are_torch():
    for ops in (Ops(), select_ops(Capability.of(torch.device("cpu")), dtype=torch.float32)):
        assert set(ops.backends.values()) == {"torch"}
        assert ops.launch is None
        assert ops.silu_and_mul is kernels.silu_and_mul


def test_a_capable_device_gets_triton(with_triton):
    ops = select_ops(H200, dtype=BF16)
    assert ops.backends["unified_attention"] == "triton"
    assert ops.backends["swap_blocks"] == "torch"
    assert ops.launch is not None
    assert ops.launch.capability == H200


def test_an_e4m3_cache_needs_a_device_that_converts_it(with_triton):
    assert select_ops(A100, dtype=BF16).backends["unified_attention"] == "triton"
    backends = select_ops(A100, dtype=BF16, kv_cache_dtype=E4M3).backends
    assert backends["unified_attention"] == backends["qk_norm_rope_and_cache"] == "torch"
    assert backends["copy_blocks_"] == "triton"


def test_overrides(with_triton):
    assert set(select_ops(H200, dtype=BF16, overrides={"all": "torch"}).backends.values()) == {"torch"}
    backends = select_ops(H200, dtype=BF16, overrides={"all": "torch", "copy_blocks_": "triton"}).backends
    assert [name for name, backend in backends.items() if backend == "triton"] == ["copy_blocks_"]
    assert select_ops(H200, dtype=BF16, overrides={"copy_blocks_": "torch"}).backends["unified_attention"] == "triton"


@pytest.mark.parametrize(
    ("capability", "name", "message"),
    [
        (H200, "attention", "there is no op 'attention'; ops are apply_logits_processors_, "),
        (H200, "swap_blocks", "swap_blocks cannot run on triton: it has no such form"),
        (
            CPU,
            "copy_blocks_",
            r"copy_blocks_ cannot run on triton: it needs compute capability 8.0, the device has 0.0",
        ),
        (A100, "unified_attention", r"an e4m3 cache needs compute capability 8.9, the device has 8.0"),
    ],
)
def test_impossible_overrides_are_refused(capability, name, message):
    with pytest.raises(ValueError, match=message):
        select_ops(capability, dtype=BF16, kv_cache_dtype=E4M3, overrides={name: "triton"})


def test_importing_kernels_does_not_import_triton():
    code = "import sys; sys.modules['triton'] = None; import kernels; kernels.select_ops"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_forms_have_the_signatures_of_the_torch_forms(with_triton):
    ops = select_ops(H200, dtype=BF16)
    for name in OP_NAMES:
        if ops.backends[name] == "triton":
            assert str(inspect.signature(getattr(ops, name))) == str(inspect.signature(getattr(Ops, name))), name
