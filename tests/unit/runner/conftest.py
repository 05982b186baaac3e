"""The devices on which engines with real runners are tried."""

import pytest

from scalellm.services.executor.runner import CpuDevice, Device, FakeCudaDevice


@pytest.fixture(params=["cpu", "graphs", "eager"])
def device(request: pytest.FixtureRequest) -> Device:
    """The CPU, and what stands for a CUDA device, with and without decode graphs."""
    if request.param == "cpu":
        return CpuDevice()
    fake = FakeCudaDevice()
    fake.has_graphs = request.param == "graphs"
    return fake
