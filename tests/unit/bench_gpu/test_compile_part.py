"""Launches find the kernels that the pool has compiled: the one path that a dry run does not take."""

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bench.gpu.parts.compile import compile_case
from scalellm.kernels import Capability
from scalellm.kernels.spec import SERVED


class CompilerOnly:
    """The part of a driver that Triton asks before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
def test_a_case_is_compiled_without_memory_or_a_launch(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_active", CompilerOnly())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    index = next(i for i, case in enumerate(SERVED) if case.name.startswith("copy_blocks_ 4 "))
    assert compile_case(index, Capability(90, 132), dry_run=False) == 1
    compiled = [path.name for path in tmp_path.glob("*/*.cubin")]
    assert compiled == ["_copy_blocks.cubin"]
    assert not torch.cuda.is_initialized()
