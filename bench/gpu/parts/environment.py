"""The device, the versions, and the ceilings that everything else is held against, measured in the same run."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.gpu.device import Device
from bench.gpu.part import Bench, Findings
from bench.gpu.probes import ReadOnly, add_one
from bench.gpu.roofline import ASSUMED, Ceilings
from scalellm.kernels import fp8_gemm

_ROOT = Path(__file__).resolve().parents[3]
_GAPS = 200


class Environment:
    """Measures bandwidth, both matrix rates and the gap between kernels."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Measure; the ceilings are shared with later parts. One that cannot be measured is assumed, and a failure."""
        device = bench.device
        found.share(device=_describe(device), versions=_versions())
        found.note(f"clocks at rest: {_clocks(device)}")
        values = ASSUMED.to_json()

        def measure(name: str, figure: str, unit: str, call: Callable[[], float]) -> None:
            with found.attempt(figure, device):
                values[name] = call()
                found.row(figure=figure, value=values[name], unit=unit)

        with found.attempt("warm-up", device):
            self._bf16(device)  # clocks rise from idle meanwhile
        measure("copy", "device-to-device copy, read + written", "GB/s", lambda: self._copy(device))
        measure("read", "read only", "GB/s", lambda: self._read(device, found))
        measure("bf16", "bf16 product", "TFLOP/s", lambda: self._bf16(device))
        found.note(f"clocks under load: {_clocks(device)}")
        if device.capability.has_e4m3:
            measure("fp8", "e4m3 product (scaled_mm)", "TFLOP/s", lambda: self._fp8(device))
        else:
            values["fp8"] = values["bf16"]
        measure("gap_us", "one of many smallest kernels in a graph", "us", lambda: self._gap(device))
        found.share(ceilings=Ceilings(**values).to_json())

    @staticmethod
    def _copy(device: Device) -> float:
        count = 1 << 10 if device.dry_run else 1 << 30
        source = torch.empty(count, dtype=torch.int16, device=device.target).random_()
        target = torch.empty_like(source)
        us = device.time(lambda: target.copy_(source), flush=False)
        return 4.0 * count / us / 1e3

    @staticmethod
    def _read(device: Device, found: Findings) -> float:
        if device.dry_run:
            probe = ReadOnly(1 << 10, device.target, block=256, steps=2)
        else:
            probe = ReadOnly(1 << 29, device.target)
        us = device.time(probe, flush=False)
        found.check("the read probe reads everything", probe.exact())
        return probe.num_bytes / us / 1e3

    @staticmethod
    def _bf16(device: Device) -> float:
        n = 32 if device.dry_run else 8192
        # Random: a product of zeros runs faster than any real one.
        a, b = (torch.randn(n, n, device=device.target).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        return 2.0 * n**3 / device.time(lambda: torch.mm(a, b.t(), out=out), flush=False) / 1e6

    @staticmethod
    def _fp8(device: Device) -> float:
        n = 32 if device.dry_run else 8192
        a, b = (torch.randn(n, n, device=device.target).to(torch.float8_e4m3fn) for _ in range(2))
        scale = torch.ones(1, device=device.target)
        out = torch.empty(n, n, dtype=torch.bfloat16, device=device.target)
        return 2.0 * n**3 / device.time(lambda: fp8_gemm(a, b, scale, scale, out=out), flush=False) / 1e6

    @staticmethod
    def _gap(device: Device) -> float:
        x = torch.zeros(1, device=device.target)
        add_one(x)
        count = 2 if device.dry_run else _GAPS

        def many() -> None:
            for _ in range(count):
                add_one(x)

        return device.time(device.capture(many), flush=False) / count


def _describe(device: Device) -> dict[str, object]:
    if device.dry_run:
        return {"name": device.capability.name}
    properties = torch.cuda.get_device_properties(device.target)
    return {
        "name": properties.name,
        "compute_capability": device.capability.sm / 10,
        "multiprocessors": device.capability.num_sms,
        "l2_mib": round(device.l2_bytes / 2**20),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
    }


def _clocks(device: Device) -> str:
    if device.dry_run:
        return "dry run"
    wanted = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu"
    return _output("nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader").split("\n")[0] or "unknown"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__
    commit = _output("git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD")
    return versions | ({"commit": commit} if commit else {})


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
