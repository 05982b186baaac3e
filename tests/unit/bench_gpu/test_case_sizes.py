"""The cases that a part runs: what the device has, and in a first run nothing that fills it."""

from types import SimpleNamespace

from bench.gpu.part import Bench
from bench.gpu.parts import FIRST, PARTS, after_first
from scalellm.kernels import Capability
from scalellm.kernels.spec import ON_DEVICE


def bench(spec, gibibytes=140, sm=90):
    device = SimpleNamespace(capability=Capability(sm, 132), free_bytes=lambda: gibibytes << 30)
    return Bench(device, 0.0, {}, spec.options)


def parts(specs):
    return {spec.name: spec for spec in specs}


def test_a_first_run_has_every_op_and_no_large_case():
    first = parts((*FIRST, *after_first(PARTS)))
    for name in ("ops", "parity", "graphs"):
        cases = [case for case in ON_DEVICE if not bench(first[name]).obstacle(case)]
        assert max(case.gibibytes for case in cases) <= 8
        assert {case.op for case in cases} == {case.op for case in ON_DEVICE}
    assert first.keys() == parts((*FIRST, *PARTS)).keys()


def test_a_full_run_has_every_case_that_the_device_can_run():
    parity = parts(PARTS)["parity"]
    assert not [case for case in ON_DEVICE if bench(parity).obstacle(case)]
    largest = max(ON_DEVICE, key=lambda case: case.gibibytes)
    assert bench(parity, gibibytes=24).obstacle(largest) == "needs 50.0 GiB"
    newest = max(ON_DEVICE, key=lambda case: case.min_sm)
    assert bench(parity, sm=80).obstacle(newest) == "needs compute capability 8.9"
