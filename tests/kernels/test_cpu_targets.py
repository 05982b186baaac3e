"""The C++ forms compiled for other CPUs than this one: code that would otherwise not be compiled, or not run, here."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from int8_case import Q_HEADS, Int8Case
from scalellm.kernels import Capability, Ops, select_ops
from scalellm.kernels.cpu import building
from scalellm.kernels.reference.w4a16 import dequantise_packed

CPU = Capability(sm=0, num_sms=1)
NEEDS = {level.name: level.needs for level in building.LEVELS}
CPUS = {"haswell": NEEDS["avx2"], "skylake-avx512": NEEDS["avx512"]}

CHOICES = {"avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni"}
"""The instruction sets for which the sources have code of its own."""


@pytest.fixture(scope="module", params=CPUS)
def ops(request, tmp_path_factory):
    found = building.cpu_features()
    if not found >= CPUS[request.param]:
        pytest.skip("this CPU lacks some of its instructions")
    if not found & CHOICES - CPUS[request.param]:
        pytest.skip("what is compiled for this CPU is the same code")
    with pytest.MonkeyPatch.context() as patch:
        flags = (f"-march={request.param}", "-O1")  # less time in the compiler, the same code
        patch.setattr(building, "LEVELS", [building.Level(request.param, flags, CPUS[request.param])])
        chosen = select_ops(CPU, dtype=torch.float32, build_dir=tmp_path_factory.mktemp(request.param))
    if chosen.library is None:
        pytest.skip("there is no compiler")
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("level", building.LEVELS, ids=lambda level: level.name)
def test_sources_are_sound_for_cpus_that_this_one_is_not(level):
    compiler = next(filter(None, map(shutil.which, building.COMPILERS)), None)
    # To the end, assembler included, but without the compiler's most expensive part.
    check = [compiler or "", *building.FLAGS, *level.flags, "-O0", "-c", "-o", os.devnull]
    if compiler is None or subprocess.run([*check, "-x", "c++", os.devnull], capture_output=True).returncode:
        pytest.skip("there is no compiler that knows such CPUs")

    def failure(source):
        ended = subprocess.run([*check, str(source)], capture_output=True, text=True)
        return ended.stderr if ended.returncode else None

    with ThreadPoolExecutor(2) as threads:
        assert not list(filter(None, threads.map(failure, building.SOURCES.glob("*.cpp"))))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(("group_size", "columns"), [(32, 96), (64, 40), (8, 7), (24, 150)])
def test_products(ops, bits, has_zeros, group_size, columns):
    gemm = ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm
    inputs = 3 * group_size
    words = torch.randint(-(1 << 31), 1 << 31, (inputs * bits // 32, columns)).int()
    words[:, 0], words[:, 1] = 0, -1  # the least and the greatest numbers
    scales = randn(3, columns)
    zeros = (randn(3, columns).abs() * (1 << bits - 1)).round() if has_zeros else None
    # Inputs that are whole numbers of which each group has a 127 are not rounded at all.
    x = torch.randint(-127, 128, (19, inputs)).float()
    x[:, ::group_size] = 127
    x[3], x[4] = 127, torch.where(torch.arange(inputs) % 2 == 0, 127, -127)
    got = gemm(x, words, scales, zeros, group_size=group_size)
    matrix = dequantise_packed(words, scales, zeros, bits, group_size).double()
    bound = 2e-6 * (x.double().abs() @ matrix.abs())
    assert bool(((got.double() - x.double() @ matrix).abs() <= bound).all())
    for rows in (1, 2, 3, 4, 6, 9):
        assert torch.equal(gemm(x[-rows:], words, scales, zeros, group_size=group_size), got[-rows:])


@pytest.mark.parametrize("head_dim", [64, 80])
def test_attention(ops, paged_case, head_dim):
    """Against the torch forms; these are held against float64 elsewhere."""
    case = paged_case([0, 1, 17, 300, 20], [1, 1, 1, 33, 5], q_heads=6, kv_heads=2, head_dim=head_dim)
    caches = (case.k_cache, case.v_cache)
    args = (case.q, *caches, case.cu_seqlens_q, case.seq_lens, case.block_table)
    for options in ({}, {"softcap": 3.0, "window": 7, "sinks": torch.linspace(-1, 1, 6)}):
        got = ops.unified_attention(*args, max_seqlen_q=33, scale=0.1, **options)
        torch.testing.assert_close(got, Ops().unified_attention(*args, max_seqlen_q=33, scale=0.1, **options))
    decode = (case.q[case.cu_seqlens_q[:5].long()], *caches, case.block_table, case.seq_lens)
    got = ops.paged_attention_decode(*decode, scale=0.1)
    torch.testing.assert_close(got, Ops().paged_attention_decode(*decode, scale=0.1))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_attention_over_8_bits(ops, head_dim):
    case = Int8Case(ops, [1, 17, 64, 300], head_dim=head_dim)
    for options in ({}, {"softcap": 3.0, "window": 30, "sinks": torch.linspace(-1, 1, Q_HEADS)}):
        prompt = case.prompt(ops, **options)
        # Weights have 7 bits where products of bytes take several instructions.
        torch.testing.assert_close(prompt.double(), case.expected(**options), atol=0.1, rtol=0.1)
    last = case.starts[1:].long() - 1
    assert torch.equal(case.decode(ops, last, case.lens, case.table), case.prompt(ops)[last])


@pytest.mark.parametrize("width", [64, 90])
def test_norm_and_activations(ops, width):
    x, residual, weight = randn(5, width), randn(5, width, seed=1), randn(width, seed=2)
    torch.testing.assert_close(
        ops.fused_add_rms_norm(x.clone(), residual.clone(), weight, 1e-5),
        Ops().fused_add_rms_norm(x.clone(), residual.clone(), weight, 1e-5),
    )
    for name in ("silu_and_mul", "gelu_tanh_and_mul"):
        torch.testing.assert_close(getattr(ops, name)(x), getattr(Ops(), name)(x), rtol=1e-5, atol=1e-6)
