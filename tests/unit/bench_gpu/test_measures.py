"""The measures from which figures and verdicts are made."""

import pytest
import torch

from bench.gpu.device import DryRunDevice, Span
from bench.gpu.parts.sanitizer import judge
from bench.gpu.roofline import ASSUMED, LLAMA_8B, MIXTRAL, Ceilings, Cost, step_floor_us
from bench.gpu.timeline import kernels_of
from bench.gpu.timing import num_sets, time_op
from scalellm.kernels.spec.case import E4M3, compare

H200 = Ceilings(copy=4300, read=4300, bf16=790, fp8=1580, gap_us=1.3)


@pytest.mark.parametrize(
    ("shape", "precision", "kv_bytes", "seqs", "milliseconds"),
    [
        # By hand: 15.0 GB of weights, and 64 * 1024 tokens of 128 KiB.
        (LLAMA_8B, "bf16", 2, 64, (15.01e9 + 64 * 1024 * 131072) / 4300e6),
        (LLAMA_8B, "bf16", 2, 1, (15.01e9 + 1024 * 131072) / 4300e6),
        (LLAMA_8B, "fp8", 1, 64, (8.03e9 + 64 * 1024 * 65536) / 4300e6),
        (MIXTRAL, "fp8", 1, 64, (46.7e9 + 64 * 1024 * 65536) / 4300e6),
    ],
)
def test_a_decode_step_reads_weights_and_cache(shape, precision, kv_bytes, seqs, milliseconds):
    floor = step_floor_us(shape, H200, seqs=seqs, context=1024, precision=precision, kv_bytes=kv_bytes)
    assert 1 <= floor / 1e3 / milliseconds < 1.07  # and the activations


def test_a_prompt_is_bound_by_products():
    floor = step_floor_us(LLAMA_8B, H200, seqs=1, tokens=1024)
    assert floor / 1e3 == pytest.approx(2 * 6.98e9 * 1024 / 790e9, rel=0.12)


def test_the_longer_of_moving_and_computing_counts():
    assert Cost(4.3e9, bf16_flops=1).floor_us(H200) == pytest.approx(1000)
    assert Cost(1, bf16_flops=790e9).floor_us(H200) == pytest.approx(1000)
    assert not Cost(1, fp8_flops=790e9).is_bandwidth(H200)


def test_reads_and_writes_have_their_own_ceilings():
    ceilings = Ceilings(copy=4000, read=4800, bf16=790, fp8=1580, gap_us=1)
    assert Cost(4.8e9).floor_us(ceilings) == pytest.approx(1000)
    assert Cost(4e9, written=2e9).floor_us(ceilings) == pytest.approx(1000)  # a copy
    assert 1000 < Cost(4.4e9, written=1.1e9).floor_us(ceilings) < 1050
    assert Ceilings.of({}) == ASSUMED  # what measures them was stopped


def test_the_time_of_a_replay_by_kernel_and_the_gaps_before_each():
    spans = [
        Span("gemm", 0, 10),
        Span("norm", 12, 13),
        Span("gemm", 13, 25),
        Span("norm", 24, 26),
        Span("gemm", 30, 31),
    ]
    assert kernels_of(spans) == [
        "5 launches, 26.0 us in kernels, 6.0 us in gaps",
        "   3 x      23.0 us, gaps     4.0 us  gemm",
        "   2 x       3.0 us, gaps     2.0 us  norm",
    ]
    assert kernels_of([Span(f"kernel {i}", i, i + 1) for i in range(30)])[-1].endswith("of 6 others")
    assert kernels_of([]) == ["0 launches, 0.0 us in kernels, 0.0 us in gaps"]


def test_one_wrong_row_among_many_is_seen():
    exact = torch.randn(1000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = exact.float()
    assert compare(got, exact, 1e-5).passed
    got[500] += 0.01
    assert not compare(got, exact, 1e-3).passed


def test_unwritten_and_overwritten_places_are_seen():
    exact = torch.ones(4, 8, dtype=torch.float64)
    got = exact.float()
    got[1, 2] = torch.nan
    assert not compare(got, exact, 1.0).passed
    exact[1] = torch.nan  # must not have been written
    assert not compare(got, exact, 1.0).passed
    got[1] = torch.nan
    assert compare(got, exact, 1e-6).passed


def test_codes_may_be_one_apart_rarely():
    codes = torch.linspace(-400, 400, 1000).to(E4M3)
    near, far = codes.view(torch.uint8).clone(), codes.view(torch.uint8).clone()
    near[7] += 1
    far[7] += 2
    assert compare(near.view(E4M3), codes, None).passed
    assert not compare(far.view(E4M3), codes, None).passed
    near[:20] += 1
    assert not compare(near.view(E4M3), codes, None).passed


def test_integers_are_exact():
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 2]), None).passed
    assert not compare(torch.tensor([1, 2]), torch.tensor([1, 3]), None).passed


class CountingDevice(DryRunDevice):
    l2_bytes = 60 << 20

    def __init__(self):
        super().__init__()
        self.l2_bytes = 60 << 20


def test_inputs_that_fit_in_the_cache_take_turns():
    device = CountingDevice()
    assert num_sets(device, 4 << 20) == 32
    assert num_sets(device, 90 << 20) == 2
    assert num_sets(device, 1 << 30) == 1
    called: list[int] = []
    timing = time_op(device, [lambda i=i: called.append(i) for i in range(3)], 1 << 30)
    assert timing.cold
    assert called[-3:] == [0, 1, 2]
    assert not time_op(device, [lambda: None], 1 << 20).cold


@pytest.mark.parametrize(
    ("code", "output", "clean"),
    [
        (0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", True),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True),
        (86, "========= Invalid __global__ read\n========= ERROR SUMMARY: 2 errors\n", False),
        (1, "WRONG unified_attention\n========= ERROR SUMMARY: 0 errors\n", False),
        (0, "nothing said", False),
        (255, "========= Error: Device not supported. Please refer to the documentation\n", None),
    ],
)
def test_what_compute_sanitizer_says(code, output, clean):
    assert judge(code, output, watched=True).clean is clean
