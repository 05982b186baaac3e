"""`topk_softmax`: the k largest of softmax(logits) with their experts; `moe_align_block_size`: pairs ordered by expert.

Of router logits [T, E] (Shazeer et al. 2017; weights may be divided by their sum, as in Mixtral). Of equal logits the
lowest experts are taken. The layout gives each expert whole blocks of pairs, padded (Gale et al. 2022, MegaBlocks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalellm.kernels.dispatch import Ops
from scalellm.kernels.reference.moe import moe_align_block_size
from scalellm.kernels.spec.case import BF16, FP32, Bound, Case, Maker, Spec
from scalellm.kernels.workspaces import moe_layout_sizes


def _topk(tokens: int, experts: int, k: int, renormalize: bool, dtype: torch.dtype = FP32) -> Case:
    def bind(ops: Ops, make: Maker) -> Bound:
        logits = make.randn(tokens, experts, dtype=dtype, scale=3.0)
        logits[tokens // 2] = 0.0  # all equal
        logits[tokens - 1, experts // 2 :] = logits[tokens - 1, 0]
        weights, ids = make.poison(tokens, k), make.poison(tokens, k, dtype=torch.int32)

        def expected() -> dict[str, Tensor]:
            # A sort keeps equal elements in their order, which topk does not promise.
            order = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
            exact = logits.double().softmax(-1).gather(1, order)
            if renormalize:
                exact = exact / exact.sum(-1, keepdim=True)
            return {"weights": exact, "ids": order.int()}

        def run() -> object:
            return ops.topk_softmax(logits, k, renormalize, out=(weights, ids))

        return Bound(run, {"weights": weights, "ids": ids}, expected)

    what = f"{k} of {experts} for {tokens}{' renormalized' if renormalize else ''}{' bfloat16' * (dtype == BF16)}"
    return Case("topk_softmax", what, bind, tolerance=2e-6)


def _align(tokens: int, experts: int, k: int, block_size: int, *, one: bool = False) -> Case:
    """`one`: all tokens go to one expert."""

    def bind(ops: Ops, make: Maker) -> Bound:
        ids = make.randint(0, experts, tokens, k, dtype=torch.int32)
        if one:
            ids.fill_(experts - 1)
        names = ("sorted_token_ids", "expert_ids", "num_tokens_post_pad")
        size, blocks, counts = moe_layout_sizes(tokens * k, block_size, experts)
        order, of_blocks, used = (make.poison(n, dtype=torch.int32) for n in (size, blocks, 1))
        scratch = make.poison(counts, dtype=torch.int32)

        def expected() -> dict[str, Tensor]:
            exact = moe_align_block_size(ids.cpu(), block_size, experts)
            return {name: tensor.to(make.device) for name, tensor in zip(names, exact, strict=True)}

        def run() -> object:
            return ops.moe_align_block_size(ids, block_size, experts, workspace=scratch, out=(order, of_blocks, used))

        return Bound(run, dict(zip(names, (order, of_blocks, used), strict=True)), expected)

    what = f"{tokens}x{k} to {'one of ' * one}{experts} in blocks of {block_size}"
    return Case("moe_align_block_size", what, bind)


_SIZES = ((20, 6, 3), (1, 8, 2), (5, 1, 1), (33, 128, 4), (70, 256, 1), (0, 3, 2))

SPEC = Spec(
    small=(
        *(
            _topk(4, *shape, renormalize)
            for shape in ((8, 2), (1, 1), (60, 4), (128, 8))
            for renormalize in (True, False)
        ),
        *(_align(tokens, experts, k, block) for tokens, experts, k in _SIZES for block in (16, 1)),
        _align(40, 8, 1, 16, one=True),
    ),
    served=(
        _topk(64, 8, 2, True, BF16),  # Mixtral 8x7B
        _topk(64, 128, 8, True, BF16),  # Qwen3 30B-A3B
        _align(64, 8, 2, 16),
    ),
    large=(
        *(_topk(tokens, *shape) for tokens in (1, 300) for shape in ((8, 2, True), (128, 8, True), (60, 4, False))),
        *(_align(tokens, experts, k, 16) for tokens, experts, k in ((2, 8, 2), (300, 128, 8))),
        _align(4096, 128, 8, 64),
    ),
)
