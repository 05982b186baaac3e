"""`apply_logits_processors_`: l = mask((l + bias), penalties) / temperature, of logits [R, V], in place.

Seen tokens: l / r or l * r by its sign (repetition, Keskar et al. 2019), - frequency * count - presence (OpenAI's).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.reference.logits import apply_logits_processors_
from scalellm.kernels.spec.case import FP32, Bound, Case, Maker, Spec

_INT = torch.int32


def _processors(rows: int, vocab: int, *, masked: str = "some", only_mask: bool = False) -> Case:
    """`masked`: rows with a mask, "some" in any order, or "all". `only_mask`: nothing else is asked for."""

    def bind(ops: Ops, make: Maker) -> Bound:
        logits = make.randn(rows, vocab, scale=3.0)
        entries = make.permutation(rows * vocab)[: 40 * rows]
        bias, seen = entries[: len(entries) // 4], entries[len(entries) // 8 :]
        count = rows if masked == "all" else max(1, rows // 2)
        options: dict[str, Tensor] = {"bitmask": make.randint(-(2**31), 2**31, count, -(-vocab // 32), dtype=_INT)}
        if masked == "some":
            options["mask_rows"] = make.permutation(rows)[:count]
        if not only_mask:
            options |= {
                "temperature": torch.where(make.rand(rows) < 0.3, 0.0, make.rand(rows) + 0.5),
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

    what = f"{rows}x{vocab} {masked} masked{' and nothing else' if only_mask else ''}"
    return Case("apply_logits_processors_", what, bind, FP32, tolerance=1e-6)


SPEC = Spec(
    small=(
        *(_processors(3, vocab, masked=masked) for vocab in (1100, 1, 31, 32, 33) for masked in ("some", "all")),
        _processors(25, 60),  # more entries than a program takes
        _processors(4, 70, only_mask=True),
    ),
    served=(_processors(64, 128256, masked="all"), _processors(64, 128256, only_mask=True)),  # Llama 3.1
    large=(_processors(64, 128256), _processors(3, 1000)),
)
