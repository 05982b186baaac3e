"""Everything that changes logits before a token is drawn from them."""

import torch
from torch import Tensor


def apply_logits_processors_(
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
    """Apply, in this order: logit bias, repetition, frequency and presence penalty, bitmask, temperature.

    Bias and penalties touch few entries of a row, so both come as flat lists of (row, token id, value). A pair must not
    occur twice in a list; rows without an entry are untouched and may be left out.

    `sample` divides by the temperature itself and wants logits that were not divided: leave `temperature` None before
    it. It is here for callers that want the scaled logits themselves.

    Args:
        logits: [S, V] f32, changed in place and returned.
        temperature: [S] f32; rows are divided by it, rows at 0 (greedy) are left as they are.
        bitmask: [M, ceil(V / 32)] i32, bit t % 32 of word t // 32 set = token t allowed (the packing of xgrammar);
            the others become -inf.
        mask_rows: [M] i64, the row of `logits` each bitmask row is for; None: M == S, row for row.
        bias_rows: [B] i64; with `bias_token_ids` [B] i64 and `bias_values` [B] f32 (added; -inf bans the token).
        bias_token_ids: see `bias_rows`.
        bias_values: see `bias_rows`.
        seen_rows: [P] i64; with `seen_token_ids` [P] i64, the distinct tokens of a row's prompt and output.
        seen_token_ids: see `seen_rows`.
        seen_output_counts: [P] i32, occurrences in the output alone (0: the token is only in the prompt).
        repetition_penalty: [S] f32, 1 is off: positive logits of seen tokens are divided by it, others multiplied
            (CTRL, Keskar et al. 2019).
        frequency_penalty: [S] f32, 0 is off: times the count in the output, subtracted.
        presence_penalty: [S] f32, 0 is off: subtracted once from tokens in the output.

    Raises:
        ValueError: a flat list is incomplete.
    """
    bias = _entries("bias_rows, bias_token_ids, bias_values", bias_rows, bias_token_ids, bias_values)
    if bias is not None:
        rows, ids, values = bias
        logits[rows, ids] += values
    seen = _entries("seen_rows, seen_token_ids, seen_output_counts", seen_rows, seen_token_ids, seen_output_counts)
    if seen is not None:
        rows, ids, counts = seen
        values = logits[rows, ids]
        if repetition_penalty is not None:
            factor = repetition_penalty[rows]
            values = torch.where(values > 0, values / factor, values * factor)
        if frequency_penalty is not None:
            values -= frequency_penalty[rows] * counts
        if presence_penalty is not None:
            values -= presence_penalty[rows] * (counts > 0)
        logits[rows, ids] = values
    if bitmask is not None:
        bits = torch.arange(32, dtype=torch.int32, device=bitmask.device)
        banned = ((bitmask.unsqueeze(-1) >> bits) & 1).flatten(1)[:, : logits.shape[1]] == 0
        if mask_rows is None:
            logits.masked_fill_(banned, -torch.inf)
        else:
            logits[mask_rows] = logits[mask_rows].masked_fill_(banned, -torch.inf)
    if temperature is not None:
        logits.div_(torch.where(temperature == 0, 1.0, temperature).unsqueeze(1))
    return logits


def _entries(names: str, *parts: Tensor | None) -> tuple[Tensor, ...] | None:
    """Return the columns of a flat list, or None when it was not given at all."""
    given = tuple(part for part in parts if part is not None)
    if given and len(given) < len(parts):
        raise ValueError(f"{names}: give all of them or none")
    return given or None
