"""Times other tiles than the committed ones on this machine's GPU, and writes the device's own tables.

    python -m bench.gpu.tune [--only unified_attention,...] [--write]

A rule of a table is tuned for the calls of `bench.gpu.workloads` that choose it: one setting after the other is
changed, twice around, and a change is kept that makes the calls faster on average. Bounds of rules stay as they are.
What is written is `kernels/configs/<op>/<device>.json`, to be looked at and committed, and `make aot` has to pass with
it. The number of splits of a decode batch is not a tile and is not tuned.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bench.gpu.device import Call, Device
from bench.gpu.timing import num_sets, time_op
from bench.gpu.worker import make_device
from bench.gpu.workloads import all_workloads
from bench.gpu.workloads.workload import Workload
from scalellm.kernels import Capability, Launch, Ops, select_ops
from scalellm.kernels.spec.case import Maker
from scalellm.kernels.tiles import Tile, TileTable, device_slug, read_table, tile_table

_CONFIGS = Path(__file__).resolve().parents[2] / "kernels/configs"
_GAIN = 0.98  # of the time before: less is noise
_APART = 3e-2  # of the norm of a result: another tile sums in another order
_ROUNDS = 2

_LAUNCH = {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5)}
_BLOCKS = (16, 32, 64, 128)
_PACKED = {"block_n": (32, 64, 128), "words": (16, 32), **_LAUNCH}
_CHOICES: Mapping[str, Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "paged_attention_decode": {"block_n": _BLOCKS, **_LAUNCH},
        "unified_attention": {"block_m": (16, 64, 128), "block_n": _BLOCKS, **_LAUNCH},
        "fp8_gemm": {
            "block_m": (16, 32, 64, 128),
            "block_n": (32, 64, 128, 256),
            "block_k": (64, 128, 256),
            "swapped": (0, 1),
            "own": (0, 1),
            **_LAUNCH,
        },
        "fused_linear": {"block_k": (64, 128, 256), **_LAUNCH},
        "fused_moe": {"block_m": (16, 32, 64, 128), "block_n": (32, 64, 128), "block_k": (64, 128), **_LAUNCH},
        "fused_moe_wna16": {"block_m": (16, 32, 64, 128), **_PACKED},
        "w4a16_gemm": _PACKED,
        "w8a16_gemm": _PACKED,
    }
)


class TryLaunch(Launch):
    """Launches with one rule's tile replaced, and notes which rules were asked for."""

    def __init__(self, capability: Capability, op: str) -> None:
        super().__init__(capability)
        self._op = op
        self._table: TileTable = tile_table(op, capability)
        self.replaced: dict[int, Tile] = {}
        self.chosen: set[int] = set()

    def tile(self, op: str, **sizes: int) -> Tile:
        """Return the tile under trial, where the call chooses its rule."""
        if op != self._op:
            return super().tile(op, **sizes)
        rule = next(
            i for i, (bounds, _) in enumerate(self._table.rules) if all(sizes[name] <= most for name, most in bounds)
        )
        self.chosen.add(rule)
        return self.replaced.get(rule, self._table.rules[rule][1])


@dataclass(slots=True)
class Trial:
    """The calls that choose one rule, bound, with what they gave and took with the committed tile."""

    launch: TryLaunch
    rule: int
    calls: list[tuple[list[Call], int, Tensor, float]] = field(default_factory=list)

    def time(self, tile: Tile, device: Device) -> float:
        """Return the time with a tile over that with the committed one, the geometric mean over the calls.

        Infinite where it does not compile, does not fit, or gives something else.
        """
        self.launch.replaced[self.rule] = tile
        total = 0.0
        try:
            for calls, num_bytes, expected, before in self.calls:
                result = _result(calls[0])
                device.synchronize()
                if not float((result - expected).norm()) <= _APART * float(expected.norm()):
                    return math.inf
                total += math.log(time_op(device, calls, num_bytes).us / before)
        except torch.AcceleratorError:
            raise  # the device is lost
        except Exception as error:  # of the compiler, of whatever kind
            print(f"    {dict(tile)}: {type(error).__name__}: {error}".splitlines()[0][:160], file=sys.stderr)
            return math.inf
        return math.exp(total / len(self.calls))


def tune(op: str, workloads: list[Workload], device: Device) -> list[tuple[Mapping[str, int], Tile, float]]:
    """Return, for each rule of the op's table, its bounds, the best tile, and its time over the committed one's."""
    table = tile_table(op, device.capability)
    trials: dict[int, Trial] = {}
    for workload in workloads:
        launch = TryLaunch(device.capability, op)
        ops: Ops = select_ops(
            device.capability, dtype=torch.bfloat16, kv_cache_dtype=workload.kv_cache_dtype, launch=launch
        )
        num_bytes = int(max(workload.cost.num_bytes, workload.resident_bytes, 1))
        make = Maker.on(device.target)
        calls = [workload.bind(ops, make) for _ in range(num_sets(device, num_bytes, most=8))]
        expected = _result(calls[0]).clone()
        if len(launch.chosen) != 1:
            continue  # it does not go by the table
        rule = launch.chosen.pop()
        # One launch for all calls of a rule, so that a tile is replaced in one place.
        trial = trials.setdefault(rule, Trial(launch, rule))
        if trial.launch is not launch:
            ops = select_ops(
                device.capability, dtype=torch.bfloat16, kv_cache_dtype=workload.kv_cache_dtype, launch=trial.launch
            )
            make = Maker.on(device.target)
            calls = [workload.bind(ops, make) for _ in calls]
        trial.calls.append((calls, num_bytes, expected, time_op(device, calls, num_bytes).us))
    found: list[tuple[Mapping[str, int], Tile, float]] = []
    for rule, (bounds, tile) in enumerate(table.rules):
        best, time = (tile, 1.0) if rule not in trials else _descend(op, trials[rule], tile, device)
        found.append((dict(bounds), best, time))
    return found


def _descend(op: str, trial: Trial, tile: Tile, device: Device) -> tuple[Tile, float]:
    """Change one setting after the other for the better."""
    best, least = dict(tile), 1.0
    for _ in range(1 if device.dry_run else _ROUNDS):
        before = dict(best)
        for name, values in _CHOICES[op].items():
            for value in values[:2] if device.dry_run else values:
                if value == best[name]:
                    continue
                candidate = {**best, name: value}
                time = trial.time(candidate, device)
                if time < _GAIN * least:
                    best, least = candidate, time
        if best == before:
            break
    return best, least


def _result(call: Call) -> Tensor:
    result: Any = call()
    assert isinstance(result, Tensor)
    return result.float()


def render(compute_capability: int, rules: list[tuple[Mapping[str, int], Tile, float]]) -> str:
    """Return a table as committed files have it: a rule in a line."""
    lines = [json.dumps(({"when": dict(bounds)} if bounds else {}) | dict(tile)) for bounds, tile, _ in rules]
    body = ",\n    ".join(lines)
    return f'{{\n  "compute_capability": {compute_capability},\n  "rules": [\n    {body}\n  ]\n}}\n'


def main() -> int:
    """Tune, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune")
    parser.add_argument("--only", default="", help=f"of {', '.join(_CHOICES)}")
    parser.add_argument("--write", action="store_true", help="write the tables of the ops that became faster")
    parser.add_argument("--configs", type=Path, default=_CONFIGS, help="the folder of tables to write to")
    parser.add_argument("--dry-run", action="store_true", help="take every path without a GPU; no figures")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(_CHOICES)
    for name in chosen:
        if name not in _CHOICES:
            parser.error(f"--only: {name!r} has no tiles; ops are {', '.join(_CHOICES)}")
    device = make_device(args.dry_run)
    slug = device_slug(device.capability.name)
    for op in chosen:
        workloads = [
            workload
            for workload in all_workloads(tiny=device.dry_run)
            if workload.op == op and workload.min_sm <= device.capability.sm
        ]
        with torch.inference_mode():
            rules = tune(op, workloads, device)
        for bounds, tile, time in rules:
            figure = "dry run: no figures" if device.dry_run else f"{time:.3f} of the time before"
            print(f"{op} {bounds or 'otherwise'}: {dict(tile)} {figure}", flush=True)
        if args.write and (device.dry_run or any(time < 1 for _, _, time in rules)):
            path = args.configs / op / f"{slug}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(render(device.capability.sm, rules))
            read_table(args.configs, op, device.capability)  # raises where it is not one
            print(f"written to {path}")
        device.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
