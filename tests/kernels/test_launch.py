"""The launcher, with the real Triton on a driver that has no device: what would reach the GPU is written down."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from scalellm.kernels import Capability, Launch
from scalellm.kernels.launch import next_power_of_2


@triton.jit(do_not_specialize=["count"])
def fill(x_ptr, count, value, extra_ptr, N: tl.constexpr, TWICE: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, value * 2 if TWICE else value, mask=at < count)


@triton.jit
def specialising(x_ptr, count, N: tl.constexpr):
    tl.store(x_ptr, count + N)


@triton.jit
def overlapping(x_ptr, OVERLAPS: tl.constexpr):
    tl.store(x_ptr, 2.0 if OVERLAPS else 1.0)


class NoDevice:
    """The parts of a driver that a launch uses, without a device. `launched` gets the grid and kernel arguments."""

    def __init__(self):
        self.launched = launched = []
        self.utils = self

        class Launcher:
            def __init__(self, src, metadata):
                pass

            def __call__(self, *args):
                launched.append((args[:3], args[9:]))

        self.launcher_cls = Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, *args):
        return 1, 1, 0, 0, 1024


@pytest.fixture
def launched(tmp_path, monkeypatch):
    no_device = NoDevice()
    monkeypatch.setattr(driver, "_active", no_device)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        for kernel in (fill, specialising, overlapping):
            kernel.device_caches.clear()
        yield no_device.launched


@pytest.fixture
def launch():
    return Launch(Capability(sm=90, num_sms=132))


def test_a_variant_is_compiled_once_and_then_launched_alike(launched, launch):
    x, y = torch.zeros(16), torch.zeros(16)
    for tensor, count, value in ((x, 3, 0.5), (y, 1, 2.0), (y, 16, 4.0)):
        launch(fill, (2,), tensor, count, value, None, TWICE=True, N=16)
    compiled = fill.device_caches[0][0]
    assert len(compiled) == launch.num_variants == 1
    values = [(grid, args[0] is tensor, args[1:]) for (grid, args), tensor in zip(launched, (x, y, y), strict=True)]
    assert values == [
        ((2, 1, 1), True, (3, 0.5, None, 16, True)),
        ((2, 1, 1), True, (1, 2.0, None, 16, True)),
        ((2, 1, 1), True, (16, 4.0, None, 16, True)),
    ]


def test_what_triton_compiles_apart_is_a_variant_of_its_own(launched, launch):
    x = torch.zeros(64)
    calls = [
        ((x, 3, 0.5, None), {"N": 16, "TWICE": True}),
        ((x, 3, 0.5, None), {"N": 32, "TWICE": True}),
        ((x, 3, 0.5, None), {"N": 16, "TWICE": False}),
        ((x, 3, 0.5, x), {"N": 16, "TWICE": True}),
        ((x[1:], 3, 0.5, None), {"N": 16, "TWICE": True}),
        ((x, 2**40, 0.5, None), {"N": 16, "TWICE": True}),
        ((x.bfloat16(), 3, 0.5, None), {"N": 16, "TWICE": True}),
        ((x, 3, 0.5, None), {"N": 16, "TWICE": True, "num_warps": 8}),
        ((x, 3, 0.5, None), {"N": 16, "TWICE": True, "num_stages": 3}),
    ]
    for _ in range(2):
        for args, options in calls:
            launch(fill, (1,), *args, **options)
    assert len(fill.device_caches[0][0]) == launch.num_variants == len(calls)
    assert len(launched) == 2 * len(calls)


def test_a_variant_after_warm_up_is_an_alarm_and_still_runs(launched, launch):
    x = torch.zeros(16)

    def small():
        launch(fill, (1,), x, 3, 0.5, None, N=16, TWICE=False)

    assert launch.warm_up([small]) > 0
    small()
    assert launch.late_variants == []
    for _ in range(2):
        launch(fill, (1,), x, 3, 0.5, None, N=32, TWICE=False)
    assert launch.late_variants == ["fill"]
    assert len(launched) == 4


def test_an_empty_grid_launches_nothing(launched, launch):
    launch(fill, (4, 0), torch.zeros(16), 3, 0.5, None, N=16, TWICE=False)
    assert launched == []
    assert launch.num_variants == 0


def test_rules_are_held(launched, launch):
    x = torch.zeros(16)
    with pytest.raises(TypeError, match="specialising: count is an integer and not in do_not_specialize"):
        launch(specialising, (1,), x, 3, N=16)
    with pytest.raises(TypeError, match=r"fill: after 4 runtime arguments come \['N', 'TWICE'\], not \['N'\]"):
        launch(fill, (1,), x, 3, 0.5, None, N=16)


@pytest.mark.parametrize(("sm", "overlaps"), [(80, False), (90, True)])
def test_a_kernel_that_waits_itself_is_launched_early_where_the_device_can(launched, sm, overlaps):
    launch, x = Launch(Capability(sm=sm, num_sms=132)), torch.zeros(16)
    for _ in range(2):
        launch(overlapping, (1,), x)
    (compiled,) = overlapping.device_caches[0][0].values()
    assert compiled.metadata.launch_pdl is overlaps
    assert [args[1:] for _, args in launched] == [(overlaps,)] * 2


def test_next_power_of_2():
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 127, 128, 129)] == [1, 2, 4, 4, 8, 128, 128, 256]
