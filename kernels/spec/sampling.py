"""`sample`: the token argmax(l / t + g) of those that top-k, top-p and min-p leave, with noise g of each token.

Of logits l [R, V]. Gumbel-max draws from the softmax (Gumbel 1954); g = -log(-log(u)), u a counter's hash (SplitMix64,
Steele et al. 2014) of seed, position and token. The torch form is the oracle, on the CPU; its own tests compare it with
a sort in float64. What many draws show together is in `draws`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.reference.sampling import SampleOutput, sample
from scalellm.kernels.spec.case import FP32, Bound, Case, Maker, Spec
from scalellm.kernels.workspaces import sample_workspace_size

_LONG = torch.int64


def _draws(
    rows: int, vocab: int, num_logprobs: int = 0, *, spread: float = 4.0, filters: bool = True, raw: bool = False
) -> Case:
    """`raw`: log-probabilities are of other logits than those that are drawn from."""

    def bind(ops: Ops, make: Maker) -> Bound:
        logits = make.randn(rows, vocab, scale=spread)
        others = make.randn(rows, vocab, scale=spread) if raw else None

        def cycle(values: Sequence[float]) -> Tensor:
            return make.tensor([values[i % len(values)] for i in range(rows)], FP32)

        none = cycle([0.0])
        args = (
            logits,
            cycle((0.0, 0.1, 0.7, 1.0, 1.5, 5.0)),
            (cycle((0, -1, 1, 3, 50, vocab, vocab + 5, 1000)) if filters else none).long(),
            cycle((1.0, 0.5, 0.9, 0.999, 0.01)) if filters else none + 1,
            cycle((0.0, 0.0, 0.0, 0.1, 0.0, 1.0, 0.001)) if filters else none,
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
        before = logits.clone()

        def expected() -> dict[str, Tensor]:
            on_cpu = [argument.cpu() for argument in args]
            exact = sample(*on_cpu, num_logprobs=num_logprobs, logprob_logits=None if others is None else others.cpu())
            return {"logits": before, **{name: value.to(make.device) for name, value in exact._asdict().items()}}

        def run() -> object:
            return ops.sample(*args, num_logprobs=num_logprobs, logprob_logits=others, workspace=workspace, out=out)

        return Bound(run, {"logits": logits, **out._asdict()}, expected)

    marks = (" filters" * filters, f" {num_logprobs} logprobs" if num_logprobs else "", " of others" * raw)
    return Case("sample", f"{rows}x{vocab}{''.join(marks)}", bind, FP32, tolerance=4e-6)


SPEC = Spec(
    small=(
        _draws(3, 1100, 2),
        *(_draws(12, vocab, spread=spread) for vocab, spread in ((2, 4.0), (300, 12.0), (1024, 0.3), (1101, 4.0))),
        _draws(4, 1100, 4, raw=True),
    ),
    served=(
        _draws(64, 128256, 5),  # Llama 3.1
        _draws(64, 151936, 5, raw=True),  # Qwen3
        _draws(64, 262144),  # Gemma 3
    ),
    large=(
        _draws(64, 128256, filters=False),
        _draws(1, 151936, 1),
        _draws(30, 262144, 20, spread=1.0),
        _draws(7, 1100),
    ),
)
