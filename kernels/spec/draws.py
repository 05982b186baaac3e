"""Properties of many draws of the sampler together: the tokens that are ever drawn, and how often."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.spec.case import Maker, Outcome

_FP32 = torch.float32


@dataclass(frozen=True, slots=True)
class DrawCase:
    """Draws from copies of one row of logits, each at a position of its own.

    Attributes:
        what: name of the case.
        vocab: length of the row.
        rows: copies of the row; memory is rows * vocab * 4 bytes.
        rounds: times that all are drawn from.
        make_row: makes the row.
        top_k: filter; `top_p` alike.
        top_p: see `top_k`.
        judge: holds the counts of each token against the row.
    """

    what: str
    vocab: int
    rows: int
    rounds: int
    make_row: Callable[[Maker, int], Tensor]
    judge: Callable[[Tensor, Tensor], Outcome]
    top_k: int = 0
    top_p: float = 1.0

    op = "sample"
    dtype = torch.bfloat16
    kv_cache_dtype = None
    min_sm = 80

    @property
    def name(self) -> str:
        """Name of the case, different from all others'."""
        return f"sample {self.what}"

    @property
    def gibibytes(self) -> float:
        """Memory it takes, at most."""
        return 2 * self.rows * self.vocab * 4 / 2**30 + 0.5

    def check(self, ops: Ops, device: torch.device) -> Outcome:
        """Draw and count."""
        make = Maker.on(device)
        row = self.make_row(make, self.vocab)
        logits = row.repeat(self.rows, 1)

        def column(value: float) -> Tensor:
            return torch.full((self.rows,), value, dtype=_FP32, device=device)

        counts = torch.zeros(self.vocab, dtype=torch.int64, device=device)
        filters = column(self.top_k).long(), column(self.top_p), column(0.0)
        seeds = make.randint(-(2**62), 2**62, self.rows)
        for position in range(self.rounds):
            positions = torch.full_like(seeds, position)
            drawn = ops.sample(logits, column(1.0), *filters, seeds, positions).token_ids
            counts += drawn.bincount(minlength=self.vocab)
        return self.judge(row.cpu(), counts.cpu())


def chi_square(row: Tensor, counts: Tensor) -> Outcome:
    """Hold the counts against the softmax, tokens expected fewer than 10 times taken together."""
    expected = row.double().softmax(0) * counts.sum()
    rare = expected < 10
    together = torch.cat((expected[~rare], expected[rare].sum().view(1)))
    seen = torch.cat((counts[~rare], counts[rare].sum().view(1))).double()
    kept = together > 0
    statistic = float(((seen - together)[kept].square() / together[kept]).sum())
    degrees = max(1, int(kept.sum()) - 1)
    limit = chi_square_limit(degrees)
    return Outcome(statistic < limit, statistic, limit, f"chi-square {statistic:.1f}, {degrees} degrees of freedom")


def chi_square_limit(degrees: int) -> float:
    """Return the 1 - 1e-5 quantile of chi-square (Wilson and Hilferty 1931)."""
    c = 2 / (9 * degrees)
    return degrees * (1 - c + 4.265 * math.sqrt(c)) ** 3


def same_set(top_k: int, top_p: float) -> Callable[[Tensor, Tensor], Outcome]:
    """Return a judge that holds the tokens drawn at all against those that a sort in float64 lets through."""

    def judge(row: Tensor, counts: Tensor) -> Outcome:
        values = row.double()
        kept = torch.ones_like(row, dtype=torch.bool)
        if 0 < top_k < len(row):
            kept = values >= values.sort(descending=True).values[top_k - 1]
        if top_p < 1:
            ordered = values[kept].sort(descending=True).values
            mass = (ordered - ordered[0]).exp().cumsum(0)
            kept &= values >= ordered[(mass >= top_p * mass[-1]).int().argmax()]
        wrong = int(((counts > 0) != kept).sum())
        return Outcome(wrong == 0, float(wrong), 0.0, f"{wrong} of {int(kept.sum())} survivors wrong")

    return judge


def _plateau(make: Maker, vocab: int) -> Tensor:
    """A few nearly equal logits, ties among them, far above the others."""
    row = make.randn(vocab) - 30
    chosen = make.permutation(vocab)[:12]
    row[chosen] = (torch.arange(12, device=make.device) // 3).float() * 0.1
    return row


def _spread(make: Maker, vocab: int) -> Tensor:
    return make.randn(vocab) * 2


SMALL = (
    DrawCase("follows the softmax of few", 300, 2, 1, _spread, chi_square),
    DrawCase("top-k 1 of few", 300, 2, 1, _spread, same_set(1, 1.0), top_k=1),
)
_OF_LLAMA = 128256, 512, 20
LARGE = (
    DrawCase("follows the softmax", *_OF_LLAMA, _spread, chi_square),
    DrawCase("top-k 2 in a tie of 3", *_OF_LLAMA, _plateau, same_set(2, 1.0), top_k=2),
    DrawCase("top-k 7 in a tie of 3", *_OF_LLAMA, _plateau, same_set(7, 1.0), top_k=7),
    DrawCase("top-p 0.6", *_OF_LLAMA, _plateau, same_set(0, 0.6), top_p=0.6),
    DrawCase("top-k 8, top-p 0.7", *_OF_LLAMA, _plateau, same_set(8, 0.7), top_k=8, top_p=0.7),
)
