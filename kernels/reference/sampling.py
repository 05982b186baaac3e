"""Drawing the next token, and the log-probabilities that are reported with it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference.rng import BITS, gumbel, noise_bits, noise_keys

# Bounds used to evaluate the noise for few tokens without changing the draw; see `_draw`.
_MAX_NOISE = -math.log(-math.log1p(-(2.0 ** -(BITS + 1))))
_HIGH_NOISE = 5.0
_HIGH_NOISE_BITS = math.floor(math.exp(-math.exp(-_HIGH_NOISE)) * 2.0**BITS) - 1
_SLACK = 1e-3  # covers every rounding in the comparisons with these bounds

# Nearly all mass is close to the maximum: the nucleus is first looked for among logits this far from it.
_NUCLEUS_DEPTHS = (8.0, 16.0, math.inf)

# Full-width temporaries are made for this many logits at a time: larger ones come fresh from the operating system at
# every call, and their page faults cost several times the arithmetic.
_CHUNK_ELEMENTS = 1 << 18


class SampleOutput(NamedTuple):
    """What `sample` returns; S rows, k = num_logprobs.

    Attributes:
        token_ids: [S] i64, the drawn tokens.
        logprobs: [S] f32, their log-probabilities.
        top_ids: [S, k] i64, the most probable tokens, most probable first, equal ones by ascending id.
        top_logprobs: [S, k] f32, theirs.
    """

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    num_logprobs: int = 0,
    logprob_logits: Tensor | None = None,
) -> SampleOutput:
    """Draw one token per row: argmax where the temperature is 0, else Gumbel-max over the filtered, scaled logits.

    This function divides by the temperature; the logits it is given must not have been divided yet.

    A row's filters apply in the order top-k, top-p, min-p, each to the distribution the one before it left, and each is
    a threshold on the logit, so that equal logits are kept or dropped together and no order among them matters:
    top-k keeps logits >= the k-th largest, top-p the smallest such set with mass >= p, min-p probabilities >=
    min_p * the largest. The most probable token always survives.

    The noise is a pure function of (seed, position, token id), see `rng`: a row's draw depends on nothing else in the
    batch. Equal scores, and equal logits of a greedy row, go to the lowest token id. A row without a finite maximum
    (all -inf, or NaN) is treated as greedy.

    Args:
        logits: [S, V] f32, after `apply_logits_processors_`; not modified.
        temperature: [S] f32, >= 0.
        top_k: [S] i32 or i64; <= 0 or >= V is off.
        top_p: [S] f32; >= 1 is off.
        min_p: [S] f32; <= 0 is off.
        seeds: [S] i64; samples of one request need distinct ones, see `sample_seed`.
        positions: [S] i64, position of the token that is drawn.
        num_logprobs: number k of top log-probabilities to return.
        logprob_logits: [S, V] f32 that log-probabilities are computed from; None: `logits`. Temperature and filters do
            not enter. Pass the model's own logits when processors changed `logits` and raw values are wanted.
    """
    token_ids, largest = _argmax(logits)
    drawn = ((temperature > 0) & largest.isfinite()).nonzero().flatten().tolist()
    if drawn:
        keys = noise_keys(seeds, positions).tolist()
        maxima, temperatures = largest.tolist(), temperature.tolist()
        ks, ps, min_ps = top_k.tolist(), top_p.tolist(), min_p.tolist()
        for row in drawn:
            scaled = (logits[row] - maxima[row]).div_(temperatures[row])
            threshold = _threshold(scaled, ks[row], ps[row], min_ps[row])
            token_ids[row] = _draw(scaled, int(token_ids[row]), threshold, keys[row])

    source = logits if logprob_logits is None else logprob_logits
    log_z = _log_normaliser(source)
    logprobs = source.gather(1, token_ids.unsqueeze(1)).squeeze(1) - log_z
    top_values, top_ids = _top(source, num_logprobs)
    return SampleOutput(token_ids, logprobs, top_ids, top_values - log_z.unsqueeze(1))


def _threshold(scaled: Tensor, k: int, p: float, min_p: float) -> float:
    """Return the least logit that survives the filters. `scaled` [V] has maximum 0."""
    threshold = math.log(min_p) if min_p > 0 else -math.inf
    kept = None
    if 0 < k < scaled.shape[0]:
        kth = scaled.topk(k).values[-1]
        threshold = max(threshold, float(kth))
        kept = scaled[scaled >= kth]
    if p < 1:
        threshold = max(threshold, _nucleus(scaled if kept is None else kept, p))
    return min(threshold, 0.0)


def _nucleus(scaled: Tensor, p: float) -> float:
    """Return the largest threshold whose survivors hold at least the share `p` of the mass of `scaled`."""
    probs = scaled.softmax(-1)
    for depth in _NUCLEUS_DEPTHS:
        near = scaled >= -depth
        values, order = scaled[near].sort(descending=True)
        reached = probs[near][order].cumsum(0, dtype=torch.float64) >= p
        if bool(reached[-1]):
            return float(values[reached.int().argmax()])
    return -math.inf


def _draw(scaled: Tensor, best: int, threshold: float, key: int) -> int:
    """Return the argmax of `scaled + noise` over the tokens at or above `threshold`; token `best` has the maximum, 0.

    The noise is bounded, so a token further below the score of `best` than that bound cannot win. Of the rest, one
    needs either a logit close to that score or a rare, high noise, which shows in the integer bits: logarithms are
    computed for few. Both cuts are exact.
    """
    score = float(gumbel(noise_bits(key, torch.tensor([best]))))
    ids = (scaled >= max(threshold, score - _MAX_NOISE - _SLACK)).nonzero().flatten()
    bits, values = noise_bits(key, ids), scaled[ids]
    near = (values >= score - _HIGH_NOISE - _SLACK) | (bits >= _HIGH_NOISE_BITS)
    scores = values[near].double() + gumbel(bits[near])
    return int(ids[near][scores.argmax()])


def _argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ids, values) of each row's maximum, the lowest id on ties.

    In two levels, tile maxima first: torch's vectorised `amax` is over ten times as fast as its `argmax`.
    """
    rows, vocab = logits.shape
    tile = 256
    tiles = vocab // tile
    maxima = logits[:, : tiles * tile].reshape(rows, tiles, tile).amax(-1)
    if tiles * tile < vocab:
        maxima = torch.cat((maxima, logits[:, tiles * tile :].amax(-1, keepdim=True)), dim=1)
    first = maxima.argmax(-1, keepdim=True)
    columns = (first * tile + torch.arange(tile)).clamp_(max=vocab - 1)
    values = logits.gather(1, columns)
    inner = values.argmax(-1, keepdim=True)
    return columns.gather(1, inner).squeeze(1), values.gather(1, inner).squeeze(1)


def _log_normaliser(logits: Tensor) -> Tensor:
    """Return logsumexp of each row, by way of the fused softmax, which is several times as fast as logsumexp."""
    chunks = logits.split(max(1, _CHUNK_ELEMENTS // logits.shape[1]))  # type: ignore[no-untyped-call]
    return torch.cat([chunk.amax(-1) - chunk.softmax(-1).amax(-1).log() for chunk in chunks])


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (values, ids) of the k largest per row, equal ones by ascending id."""
    if k == 0:
        return logits.new_empty(logits.shape[0], 0), torch.empty(logits.shape[0], 0, dtype=torch.int64)
    values, ids = logits.topk(k)
    # topk leaves open which of equal values it takes, and their order; only then is the full sort needed.
    tied = ((logits >= values[:, -1:]).sum(-1) > k) | (values[:, 1:] == values[:, :-1]).any(-1)
    for row in tied.nonzero().flatten().tolist():
        order = logits[row].sort(descending=True, stable=True)
        values[row], ids[row] = order.values[:k], order.indices[:k]
    return values, ids
