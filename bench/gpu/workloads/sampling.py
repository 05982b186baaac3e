"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch

from bench.gpu.device import Call
from bench.gpu.roofline import LLAMA_8B, Cost
from bench.gpu.workloads.workload import Workload
from scalellm.kernels import Ops, SampleOutput, sample_workspace_size
from scalellm.kernels.spec.case import Maker

Kind = Literal["greedy", "draw", "top-p 0.95 peaked", "top-p 0.95 flat"]
# Of the logits. At 5 some 200 of 128,256 tokens hold 95 % of the mass, about as many as a model's; at 1 some 95,000 do,
# as after a temperature that is far too high.
_SPREAD: Mapping[Kind, float] = MappingProxyType(
    {"greedy": 3.0, "draw": 3.0, "top-p 0.95 peaked": 5.0, "top-p 0.95 flat": 1.0}
)


def _sample(rows: int, vocab: int, kind: Kind) -> Workload:
    def bind(ops: Ops, make: Maker) -> Call:
        logits = make.randn(rows, vocab, scale=_SPREAD[kind])
        zero = torch.zeros(rows, device=make.device)
        temperature = zero if kind == "greedy" else zero + 1
        top_p = zero + (0.95 if kind.startswith("top-p") else 1.0)
        seeds = make.randint(0, 2**62, rows)
        workspace = make.poison(sample_workspace_size(rows, vocab), dtype=torch.int64)
        out = SampleOutput(
            torch.empty(rows, dtype=torch.int64, device=make.device),
            torch.empty(rows, device=make.device),
            torch.empty(rows, 0, dtype=torch.int64, device=make.device),
            torch.empty(rows, 0, device=make.device),
        )
        return lambda: ops.sample(
            logits, temperature, zero.long(), top_p, zero, seeds, seeds, workspace=workspace, out=out
        )

    def own(make: Maker) -> Call:
        logits = make.randn(rows, vocab, scale=_SPREAD[kind])
        noise = make.rand(rows, vocab)

        def call() -> object:
            if kind == "greedy":
                return logits.argmax(-1)
            probs = logits.softmax(-1)
            if kind.startswith("top-p"):
                ordered, ids = probs.sort(-1, descending=True)
                probs = torch.zeros_like(probs).scatter_(1, ids, ordered * (ordered.cumsum(-1) - ordered < 0.95))
            return (probs / noise).argmax(-1)

        return call

    own_name = {"greedy": "argmax", "draw": "softmax, argmax"}.get(kind, "softmax, sort, argmax")
    return Workload("sample", f"{rows} x {vocab} {kind}", Cost(4.0 * rows * vocab), bind, own, own_name)


def _mask(rows: int, vocab: int) -> Workload:
    words = -(-vocab // 32)

    def bind(ops: Ops, make: Maker) -> Call:
        logits = make.randn(rows, vocab)
        bitmask = make.randint(-(2**31), 2**31, rows, words, dtype=torch.int32)
        return lambda: ops.apply_logits_processors_(logits, bitmask=bitmask)

    # Half of the logits are written, none has to be read.
    cost = Cost(rows * (2.0 * vocab + 4.0 * words), written=2.0 * rows * vocab)
    return Workload("apply_logits_processors_", f"{rows} x {vocab} mask", cost, bind)


def workloads(*, tiny: bool) -> list[Workload]:
    """The vocabulary of Llama-3.1."""
    if tiny:
        return [_sample(2, 300, "greedy"), _sample(1, 300, "top-p 0.95 flat"), _mask(2, 70)]
    vocab = LLAMA_8B.vocab
    return [
        *(_sample(rows, vocab, "draw") for rows in (1, 8, 64, 256)),
        *(_sample(rows, vocab, "top-p 0.95 peaked") for rows in (1, 64, 256)),
        *(_sample(rows, vocab, "top-p 0.95 flat") for rows in (1, 64)),
        _sample(64, vocab, "greedy"),
        _mask(64, vocab),
    ]
