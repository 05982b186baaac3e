"""Random weights, made where they are used: benchmarks without a checkpoint."""

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.causal_lm import CausalLM
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.weight_slot import WeightSlot, finish_all

_E4M3_NAN = 127  # and, with the sign, 255


def dummy_model(
    config: ModelConfig, runtime: ModelRuntime, *, seed: int = 0, max_model_len: int | None = None
) -> CausalLM:
    """Return a model with random weights of the size that keeps activations near 1, in their final form from the start.

    The form depends on the runtime alone, not on how a checkpoint of the model would store its weights. Takes the
    memory of the model and of one matrix. Equal seeds give equal weights on devices of one kind.
    """
    model = CausalLM(replace(config, stored_linears=None), runtime, max_model_len=max_model_len)
    generator = torch.Generator(runtime.device)
    with torch.no_grad():
        for slot in model.weight_slots():
            # The seed depends on the name, so that weights that all ranks hold, such as a router, are the same on each.
            generator.manual_seed(seed + zlib.crc32(slot.name.encode()))
            _fill(slot, generator)
    finish_all(model.weight_slots())
    return model


def _fill(slot: WeightSlot, generator: torch.Generator) -> None:
    main, *others = slot.dests
    if main.dim() == 1:
        main.fill_(0.0 if slot.name.endswith(".bias") else 1.0)
        return
    size = slot.shape[-1] ** -0.5
    if main.dtype == torch.float8_e4m3fn:
        codes = main.view(torch.uint8).random_(0, 2 * _E4M3_NAN, generator=generator)
        codes += codes >= _E4M3_NAN
        others[0].fill_(size / _rms(_all_e4m3(main.device)))
    elif main.dtype == torch.int32:
        main.random_(-(1 << 31), (1 << 31) - 1, generator=generator)
        middle = 1 << (32 * main.shape[0] // slot.shape[-1] - 1)
        others[0].fill_(size / _rms(torch.arange(-middle, middle)))
        for zeros in others[1:]:
            zeros.fill_(middle)
    else:
        main.normal_(0.0, size, generator=generator)


def _all_e4m3(device: torch.device) -> Tensor:
    """Return every positive number of the format."""
    return torch.arange(_E4M3_NAN, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)


def _rms(numbers: Tensor) -> float:
    return numbers.float().square().mean().sqrt().item()
