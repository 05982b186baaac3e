"""Everything that changes logits before a token is drawn from them.

Bias and penalties touch single entries, so they are applied to those alone, a launch each as both may touch the same
one. Bitmask and temperature share one pass over the rows, which reads nothing but the mask when no temperature is
given, and writes only the logits it changes. What was not asked for is not launched.
"""

import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch
from scalellm.kernels.reference.logits import _entries

_TILE = 1024
_ENTRIES = 256


@triton.jit(do_not_specialize=["n"])
def _add_bias(logits, rows, ids, values, n, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    at = logits + tl.load(rows + i, mask=live, other=0).to(tl.int64) * STRIDE + tl.load(ids + i, mask=live, other=0)
    tl.store(at, tl.load(at, mask=live, other=0.0) + tl.load(values + i, mask=live, other=0.0), mask=live)


@triton.jit(do_not_specialize=["n"])
def _penalise(logits, rows, ids, counts, repetition, frequency, presence, n, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    row = tl.load(rows + i, mask=live, other=0).to(tl.int64)
    at = logits + row * STRIDE + tl.load(ids + i, mask=live, other=0)
    count = tl.load(counts + i, mask=live, other=0)
    value = tl.load(at, mask=live, other=0.0)
    if repetition is not None:
        factor = tl.load(repetition + row, mask=live, other=1.0)
        value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    if frequency is not None:
        value -= tl.load(frequency + row, mask=live, other=0.0) * count.to(tl.float32)
    if presence is not None:
        value -= tl.where(count > 0, tl.load(presence + row, mask=live, other=0.0), 0.0)
    tl.store(at, value, mask=live)


@triton.jit
def _mask_rows(
    logits, bitmask, mask_rows, V: tl.constexpr, STRIDE: tl.constexpr, MASK_STRIDE: tl.constexpr, TILE: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64)
    row = entry if mask_rows is None else tl.load(mask_rows + entry).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    words = tl.load(bitmask + entry * MASK_STRIDE + ids // 32, mask=ids < V, other=0)
    banned = ((words >> (ids % 32)) & 1) == 0
    tl.store(logits + row * STRIDE + ids, float("-inf"), mask=(ids < V) & banned)


@triton.jit
def _scale_rows(
    logits,
    temperature,
    bitmask,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    heat = tl.load(temperature + row)
    at = logits + row * STRIDE + ids
    x = tl.load(at, mask=ids < V, other=0.0)
    if bitmask is not None:
        words = tl.load(bitmask + row * MASK_STRIDE + ids // 32, mask=ids < V, other=0)
        x = tl.where(((words >> (ids % 32)) & 1) == 0, float("-inf"), x)
    x = tl.div_rn(x, tl.zeros_like(x) + tl.where(heat == 0, 1.0, heat))
    tl.store(at, x, mask=ids < V)


def apply_logits_processors_(
    launch: Launch,
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    bitmask: Tensor | None = None,
    mask_rows: Tensor | None = None,
    bias_rows: Tensor | None = None,
    bias_token_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    seen_rows: Tensor | None = None,
    seen_token_ids: Tensor | None = None,
    seen_output_counts: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
) -> Tensor:
    """Apply them in the order of the reference, in one to four launches."""
    rows, vocab = logits.shape
    stride = logits.stride(0)
    tiles = triton.cdiv(vocab, _TILE)
    bias = _entries("bias_rows, bias_token_ids, bias_values", bias_rows, bias_token_ids, bias_values)
    seen = _entries("seen_rows, seen_token_ids, seen_output_counts", seen_rows, seen_token_ids, seen_output_counts)
    if bias is not None:
        n = bias[0].numel()
        launch(_add_bias, (triton.cdiv(n, _ENTRIES),), logits, *bias, n, STRIDE=stride, BLOCK=_ENTRIES)
    penalties = repetition_penalty, frequency_penalty, presence_penalty
    if seen is not None and any(penalty is not None for penalty in penalties):
        n = seen[0].numel()
        launch(_penalise, (triton.cdiv(n, _ENTRIES),), logits, *seen, *penalties, n, STRIDE=stride, BLOCK=_ENTRIES)
    fused = temperature is not None and mask_rows is None
    if bitmask is not None and not fused:
        launch(
            _mask_rows,
            (bitmask.shape[0], tiles),
            logits,
            bitmask,
            mask_rows,
            V=vocab,
            STRIDE=stride,
            MASK_STRIDE=bitmask.stride(0),
            TILE=_TILE,
        )
    if temperature is not None:
        mask = bitmask if fused else None
        launch(
            _scale_rows,
            (rows, tiles),
            logits,
            temperature,
            mask,
            V=vocab,
            STRIDE=stride,
            MASK_STRIDE=0 if mask is None else mask.stride(0),
            TILE=_TILE,
        )
    return logits
