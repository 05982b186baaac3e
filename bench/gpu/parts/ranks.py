"""Ranks as far as one GPU shows them: collectives of one rank in graphs, and two ranks that share the device."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from bench.gpu.device import Device
from bench.gpu.engines import Load, engine_config, kv_caches, make_runner, runner_device, serve
from bench.gpu.part import Bench, Findings
from bench.gpu.second_rank import FORM, NUM_RANKS, rank_of_model, whole_model
from scalellm.kernels.spec.case import Maker, bit_equal
from scalellm.services.executor.engine import Engine, EngineConfig
from scalellm.services.executor.ipc import EngineChannel
from scalellm.services.executor.models.shard import Alone, Collectives
from scalellm.services.executor.ranks.collectives import MeetingPlace
from scalellm.services.executor.ranks.group import Followers
from scalellm.services.executor.ranks.leading_runner import LeadingRunner
from scalellm.services.executor.runner import ModelRunner

_MODEL = "llama-3.1-8b"
_HOST = "127.0.0.1"
_LAYERS = 8
_BATCHED_TOKENS = 1024
_TOLERANCE = 5e-2
"""Limit of the error of a log-probability: the ranks' sums are rounded to bfloat16 in another order."""

Answers = dict[int, list[tuple[int, float]]]


class Ranks:
    """NCCL between GPUs cannot be shown with one of them: what it does in a graph can, and what ranks compute."""

    def run(self, bench: Bench, found: Findings) -> None:
        """Add a row for each of the two."""
        with found.attempt("collectives in a graph", bench.device):
            self._captured(bench.device, found)
        with found.attempt(f"{NUM_RANKS} ranks on one device", bench.device):
            self._two_ranks(bench.device, found)

    @staticmethod
    def _captured(device: Device, found: Findings) -> None:
        """Replay kernels and the sums of one rank, as a model's layers alternate them, on inputs that are new."""
        rows, width = (2, 32) if device.dry_run else (64, 4096)
        make = Maker.on(device.target)
        collectives = MeetingPlace(1, device.target, _HOST).meet()
        try:
            x = make.randn(rows, width, dtype=torch.bfloat16)
            weight = make.rand(rows, width, dtype=torch.bfloat16)
            results = [torch.empty(0)]

            def layers() -> None:
                results[0] = _layers(x, weight, collectives)

            layers()
            replay = device.capture(layers)
            equal = True
            for _ in range(2):
                x.copy_(make.randn(rows, width, dtype=torch.bfloat16))
                replay()
                device.synchronize()
                equal &= bit_equal(results[0].clone(), _layers(x, weight, Alone()))
            backend = str(dist.get_backend())
        finally:
            dist.destroy_process_group()
        found.check(f"sums of one rank ({backend}) in a graph equal those without it bit by bit", equal)
        found.row(ranks=1, backend=backend, how="graph", layers=_LAYERS, equal_tokens=None, tokens=None)

    @staticmethod
    def _two_ranks(device: Device, found: Findings) -> None:
        """Serve the same requests by one rank and by two, each with its share of the weights."""
        load = Load(2, 5, 2) if device.dry_run else Load(8, 200, 32)
        whole = whole_model(_MODEL, load, device)
        limits = engine_config(whole.config, load, batched_tokens=_BATCHED_TOKENS)
        alone = _answers(make_runner(whole, limits, FORM, device, graphs=False), limits, load)
        leads, follows = socket.socketpair()
        with leads, follows, _second_rank(device, follows, load) as process:
            try:
                follows.close()
                followers = Followers([EngineChannel(leads)])
                model = rank_of_model(whole, followers.meet(1, torch.device("cpu")))
                caches, where = kv_caches(model, limits, FORM, device), runner_device(device, graphs=False)
                served = _answers(LeadingRunner(model, caches, limits, where, followers.tell), limits, load)
            finally:
                leads.close()
                if dist.is_initialized():
                    dist.destroy_process_group()
                process.kill()
        error = max(abs(alone[n][0][1] - served[n][0][1]) for n in range(load.seqs))
        detail = "" if device.dry_run else f"error {error:.1e} of {_TOLERANCE:.0e}"
        found.check("two ranks give the log-probabilities of one", error <= _TOLERANCE, detail)
        complete = all(len(answer) == load.output for answer in served.values())
        found.check("two ranks answer with all tokens", complete)
        pairs = [pair for n in range(load.seqs) for pair in zip(alone[n], served[n], strict=False)]
        equal = sum(one[0] == other[0] for one, other in pairs)
        found.row(
            ranks=NUM_RANKS,
            backend="gloo",
            how="eager",
            layers=whole.config.num_layers,
            equal_tokens=equal,
            tokens=len(pairs),
        )


def _answers(runner: ModelRunner, limits: EngineConfig, load: Load) -> Answers:
    return serve(Engine(limits, runner), load, limits.vocab_size, temperature=0.0, logprobs=1).answers


def _layers(x: Tensor, weight: Tensor, collectives: Collectives) -> Tensor:
    for _ in range(_LAYERS):
        x = x + collectives.all_reduce(x * weight)
    return collectives.all_gather(x)[0]


def _second_rank(device: Device, follows: socket.socket, load: Load) -> subprocess.Popen[bytes]:
    job = {
        "dry_run": device.dry_run,
        "model": _MODEL,
        "load": [load.seqs, load.prompt, load.output],
        "batched_tokens": _BATCHED_TOKENS,
    }
    command = [sys.executable, "-m", "bench.gpu.second_rank", str(follows.fileno()), json.dumps(job)]
    return subprocess.Popen(command, pass_fds=(follows.fileno(),), stdout=sys.stderr)
