"""The calls of `make gpu` in tiny sizes, so that a change of an op that they do not follow is seen without a GPU."""

import pytest
import torch

from bench.gpu import tune
from bench.gpu.device import DryRunDevice
from bench.gpu.workloads import all_workloads
from scalellm.kernels import select_ops
from scalellm.kernels.spec.case import Maker
from scalellm.kernels.tiles import TILED_OPS, read_table, tile_table

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def ops_for(launch, case):
    return select_ops(launch.capability, dtype=torch.bfloat16, kv_cache_dtype=case.kv_cache_dtype, launch=launch)


@pytest.mark.parametrize("workload", all_workloads(tiny=True), ids=lambda workload: workload.name)
def test_workload(launch, workload):
    if workload.op != "sample":  # seconds on the interpreter, and a case above
        workload.bind(ops_for(launch, workload), Maker.on(CPU))()
    if workload.own is not None:
        workload.own(Maker.on(CPU))()


def test_a_faster_tile_replaces_that_of_the_rule_its_calls_choose(monkeypatch, tmp_path):
    device, op = DryRunDevice(), "w4a16_gemm"
    monkeypatch.setattr(tune.Trial, "time", lambda self, tile, device: 0.5 if tile["num_warps"] == 2 else 1.0)
    workloads = [workload for workload in all_workloads(tiny=True) if workload.op == op]
    rules = tune.tune(op, workloads, device)
    before = tile_table(op, device.capability)
    assert [dict(tile) for _, tile, _ in rules] == [
        dict(before.rules[0][1]),
        {**before.rules[1][1], "num_warps": 2},
        *(dict(tile) for _, tile in before.rules[2:]),
    ]
    (tmp_path / op).mkdir()
    (tmp_path / op / "dry-run.json").write_text(tune.render(device.capability.sm, rules))
    assert read_table(tmp_path, op, device.capability).choose(rows=2, group_size=128, columns=64)["num_warps"] == 2


def test_a_tile_that_gives_something_else_or_does_not_run_is_not_taken():
    device, op = DryRunDevice(), "w4a16_gemm"
    launch = tune.TryLaunch(device.capability, op)
    tile = tile_table(op, device.capability).rules[1][1]
    trial = tune.Trial(launch, 1, [([lambda: torch.ones(3)], 1, torch.ones(3), 1.0)])
    assert trial.time(tile, device) == 1.0
    trial.calls[0] = ([lambda: torch.full((3,), 1.1)], 1, torch.ones(3), 1.0)
    assert trial.time(tile, device) == float("inf")

    def refuse():
        raise ValueError("out of resources")

    trial.calls[0] = ([refuse], 1, torch.ones(3), 1.0)
    assert trial.time(tile, device) == float("inf")


def test_every_op_with_tiles_is_tuned_but_splits():
    assert {*tune._CHOICES} == {*TILED_OPS} - {"num_decode_splits"}
