"""Runs the batches of the engine on a device: inputs, model, sampler."""

from services.executor.runner.model_runner import ModelRunner

__all__ = ["ModelRunner"]
