"""Runs the batches of the engine on a device: inputs, model, sampler."""

from scalellm.services.executor.runner.device import CpuDevice, CudaDevice, Device
from scalellm.services.executor.runner.fake_cuda import FakeCudaDevice
from scalellm.services.executor.runner.model_runner import ModelRunner

__all__ = ["CpuDevice", "CudaDevice", "Device", "FakeCudaDevice", "ModelRunner"]
