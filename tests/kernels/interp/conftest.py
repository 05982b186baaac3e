"""Triton forms on the interpreter: collected only by a process that was started for it (`make test-kernels`).

Triton decides when a kernel is defined whether it will be interpreted, and never again.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from bench.gpu import interpreter_fixes

    interpreter_fixes.install()
    torch.set_num_threads(1)


def pytest_configure(config):
    # Of the interpreter of triton 3.6, at every loop whose bounds are tensors.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture
def launch():
    """A device of few processors, so that grids sized by them stay small."""
    from scalellm.kernels import Capability, Launch

    return Launch(Capability(sm=90, num_sms=4))


@pytest.fixture
def ops(launch):
    """All ops that have one in their Triton form."""
    from scalellm.kernels import select_ops

    return select_ops(launch.capability, dtype=torch.bfloat16, launch=launch)


@pytest.fixture
def last_program_first(monkeypatch):
    """Programs run in the opposite order: a result that changes was written by two of them."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.set_grid_idx

    def mirrored(self, *index):
        plain(self, *(size - 1 - at for size, at in zip(self.grid_dim, index, strict=True)))

    return lambda: monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", mirrored)
