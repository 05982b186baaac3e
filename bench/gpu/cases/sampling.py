"""The processors of logits, and the sampler against its torch form on the CPU (whose tests compare it with a sort)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.cases.case import Bound, Case, Maker
from scalellm.kernels import Ops, SampleOutput, apply_logits_processors_, sample, sample_workspace_size

_FP32, _LONG, _INT = torch.float32, torch.int64, torch.int32


def _processors(rows: int, vocab: int) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        logits = make.randn(rows, vocab, scale=3.0)
        entries = make.permutation(rows * vocab)[: 40 * rows]
        bias, seen = entries[: 10 * rows], entries[5 * rows :]
        count = rows // 2
        options = {
            "temperature": torch.where(make.rand(rows) < 0.3, 0.0, make.rand(rows) + 0.5),
            "bitmask": make.randint(-(2**31), 2**31, count, -(-vocab // 32), dtype=_INT),
            "mask_rows": make.permutation(rows)[:count],
            "bias_rows": bias // vocab,
            "bias_token_ids": bias % vocab,
            "bias_values": make.randn(len(bias)),
            "seen_rows": seen // vocab,
            "seen_token_ids": seen % vocab,
            "seen_output_counts": make.randint(0, 4, len(seen), dtype=_INT),
            "repetition_penalty": make.rand(rows) + 0.5,
            "frequency_penalty": make.randn(rows),
            "presence_penalty": make.randn(rows),
        }

        def expected() -> dict[str, Tensor]:
            wide = {name: t.double() if t.is_floating_point() else t for name, t in options.items()}
            return {"logits": apply_logits_processors_(logits.double(), **wide)}

        return Bound(lambda: ops.apply_logits_processors_(logits, **options), {"logits": logits}, expected)

    return Case("apply_logits_processors_", f"{rows}x{vocab}", bind)


def _draws(rows: int, vocab: int, num_logprobs: int, *, spread: float = 4.0, filters: bool = True) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        logits = make.randn(rows, vocab, scale=spread)

        def cycle(*values: float) -> Tensor:
            return make.tensor([values[i % len(values)] for i in range(rows)], _FP32)

        none = cycle(0.0)
        args = (
            logits,
            cycle(0.0, 0.1, 0.7, 1.0, 1.5, 5.0),
            (cycle(0, -1, 1, 3, 50, vocab, 1000) if filters else none).long(),
            cycle(1.0, 0.5, 0.9, 0.999, 0.01) if filters else none + 1,
            cycle(0.0, 0.0, 0.0, 0.1, 0.0, 1.0, 0.001) if filters else none,
            make.randint(-(2**62), 2**62, rows),
            make.randint(0, 10**6, rows),
        )
        workspace = make.poison(sample_workspace_size(rows, vocab, num_logprobs), dtype=_LONG)
        out = SampleOutput(
            make.poison(rows, dtype=_LONG),
            make.poison(rows),
            make.poison(rows, num_logprobs, dtype=_LONG),
            make.poison(rows, num_logprobs),
        )

        def expected() -> dict[str, Tensor]:
            exact = sample(*(argument.cpu() for argument in args), num_logprobs=num_logprobs)
            return {name: value.to(make.device) for name, value in exact._asdict().items()}

        def run() -> object:
            return ops.sample(*args, num_logprobs=num_logprobs, workspace=workspace, out=out)

        return Bound(run, out._asdict(), expected)

    what = f"{rows}x{vocab}{' filters' if filters else ''}{f' {num_logprobs} logprobs' if num_logprobs else ''}"
    return Case("sample", what, bind, tolerance=1e-5)


def cases(*, tiny: bool) -> list[Case]:
    """Vocabularies of the models, every filter, one row and many."""
    if tiny:
        return [_processors(2, 70), _draws(3, 1100, 2)]
    return [
        _processors(64, 128256),
        _processors(3, 1000),
        _draws(60, 128256, 5),
        _draws(64, 128256, 0, filters=False),
        _draws(1, 151936, 1),
        _draws(30, 262144, 20, spread=1.0),
        _draws(7, 1100, 0),
    ]
