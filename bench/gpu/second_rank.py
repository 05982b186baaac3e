"""The second of two ranks on one GPU: `python -m bench.gpu.second_rank SOCKET JOB`, started by `bench.gpu.parts.ranks`.

Its sums with the first one go through the memory of the host by gloo, as NCCL takes one rank for each GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.device import Device
from bench.gpu.engines import Load, engine_config, kv_caches, runner_device
from bench.gpu.models import FORMATS, make_model, shortened, tiny
from bench.gpu.worker import make_device
from scalellm.services.executor.ipc import EngineChannel
from scalellm.services.executor.models import CausalLM, ModelConfig
from scalellm.services.executor.models.shard import Collectives, Shard
from scalellm.services.executor.ranks.following import follow
from scalellm.services.executor.ranks.group import join, plans_from
from scalellm.services.executor.ranks.told_masks import ToldMasks
from scalellm.services.executor.runner import ModelRunner

NUM_RANKS = 2
FORM = FORMATS["bf16"]


class ThroughHost:
    """Collectives of tensors that are copied to the host's memory and back.

    Args:
        collectives: Those of the host.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up in place."""
        return tensor.copy_(self._collectives.all_reduce(tensor.cpu()))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack by rank."""
        return self._collectives.all_gather(tensor.cpu()).to(tensor.device)


def config_of(name: str, device: Device) -> ModelConfig:
    """Return a preset with two layers; in a dry run a small one."""
    return tiny(name) if device.dry_run else shortened(name, 2)


def whole_model(name: str, load: Load, device: Device) -> CausalLM:
    """Return the model that the ranks hold together, the same in each process."""
    return make_model(config_of(name, device), FORM, device, max_model_len=load.length)


def rank_of_model(whole: CausalLM, shard: Shard) -> CausalLM:
    """Return what a rank holds of a model, with its sums through the host."""
    shard = replace(shard, collectives=ThroughHost(shard.collectives))
    model = CausalLM(whole.config, replace(whole.runtime, shard=shard))
    weights = {slot.name: slot.dest for slot in whole.weight_slots()}
    for slot in model.weight_slots():
        slot.dest.copy_(weights[slot.name][slot.window or ...])
    return model


def main() -> None:
    """Follow the first rank until it is gone."""
    channel = EngineChannel(socket.socket(fileno=int(sys.argv[1])))
    job = json.loads(sys.argv[2])
    device, load = make_device(job["dry_run"]), Load(*job["load"])
    whole = whole_model(job["model"], load, device)
    limits = engine_config(whole.config, load, batched_tokens=job["batched_tokens"])
    plans = plans_from(channel)
    model = rank_of_model(whole, join(plans, 1, NUM_RANKS, 1, torch.device("cpu")))
    masks = ToldMasks(limits.max_num_seqs, limits.vocab_size)
    caches = kv_caches(model, limits, FORM, device)
    with contextlib.suppress(EOFError):
        follow(
            plans, ModelRunner(model, caches, limits, runner_device(device, graphs=False), masks=masks), masks, limits
        )


if __name__ == "__main__":
    main()
    os._exit(0)  # the first rank is gone: nothing is to be put away with it
