"""Drawing the next token, and the log-probabilities that are reported with it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scalellm.kernels.reference import search
from scalellm.kernels.reference.rng import BITS, gumbel, noise_bits, noise_keys

# Bounds used to evaluate the noise for few tokens without changing the draw; see `_Draw` and `_best`.
_MAX_NOISE = -math.log(-math.log1p(-(2.0 ** -(BITS + 1))))
_HIGH_NOISE = 5.0
_HIGH_NOISE_BITS = math.floor(math.exp(-math.exp(-_HIGH_NOISE)) * 2.0**BITS) - 1
_SLACK = 1e-3  # covers every rounding in the comparisons with these bounds

# Nearly all mass is close to the maximum: the nucleus is first looked for among logits this far from it.
_NUCLEUS_DEPTHS = (5.0, 10.0, 20.0, math.inf)

# Full-width temporaries are made for this many logits at a time: larger ones come fresh from the operating system at
# every call, and their page faults cost several times the arithmetic.
_CHUNK_ELEMENTS = 1 << 18


class SampleOutput(NamedTuple):
    """The result of `sample`; S rows, k = num_logprobs, 0 for None.

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
    num_logprobs: int | None = 0,
    logprob_logits: Tensor | None = None,
    workspace: Tensor | None = None,
    out: SampleOutput | None = None,
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
        num_logprobs: number k of top log-probabilities to return. None: that of the drawn token is not wanted either,
            and `logprobs` may hold anything.
        logprob_logits: [S, V] f32 that log-probabilities are computed from; None: `logits`. Temperature and filters do
            not enter. Pass the model's own logits when processors changed `logits` and raw values are wanted.
        workspace: scratch of a device kernel, i64, of `kernels.sample_workspace_size`; no effect on the
            result and none here.
        out: receives the results.
    """
    maxima = search.tile_maxima(logits)
    token_ids, largest = search.argmax(logits, maxima)
    drawn = ((temperature > 0) & largest.isfinite()).nonzero().flatten().tolist()
    if drawn:
        keys = noise_keys(seeds, positions)
        noise = gumbel(noise_bits(keys, token_ids)).tolist()  # of each row's most probable token
        peaks, temperatures, row_keys = largest.tolist(), temperature.tolist(), keys.tolist()
        ks, ps, min_ps = top_k.tolist(), top_p.tolist(), min_p.tolist()
        for row in drawn:
            draw = _Draw(logits[row], maxima[row], peaks[row], temperatures[row])
            ids, scaled = draw.survivors(ks[row], ps[row], min_ps[row], noise[row])
            token_ids[row] = _best(ids, scaled, row_keys[row], noise[row])

    source = logits if logprob_logits is None else logprob_logits
    log_z = _log_normaliser(source)
    logprobs = source.gather(1, token_ids.unsqueeze(1)).squeeze(1) - log_z
    if num_logprobs and source is not logits:
        maxima = search.tile_maxima(source)
    top_values, top_ids = search.top(source, maxima, num_logprobs or 0)
    result = SampleOutput(token_ids, logprobs, top_ids, top_values - log_z.unsqueeze(1))
    return result if out is None else SampleOutput(*(to.copy_(value) for to, value in zip(out, result, strict=True)))


class _Draw(NamedTuple):
    """One row to draw from: `(logits - largest) / temperature` are its scaled logits, all <= 0."""

    logits: Tensor
    maxima: Tensor
    largest: float
    temperature: float

    def survivors(self, k: int, p: float, min_p: float, best_noise: float) -> tuple[Tensor, Tensor]:
        """Return ids, ascending, and scaled logits of every token that passes the filters and can win the draw.

        The noise is bounded, so a token further below the score of the most probable one than that bound cannot win.
        Without filters, some that cannot win are returned as well.
        """
        floor = best_noise - _MAX_NOISE - _SLACK
        if min_p > 0:
            floor = max(floor, math.log(min(min_p, 1.0)))
        if 0 < k < self.logits.shape[0]:
            ids, values = search.top_with_ties(self.logits, self.maxima, k)
            scaled = self._scale(values)
            if p < 1:
                floor = max(floor, _nucleus(scaled, float(scaled.double().exp().sum()), p))
        elif p < 1:
            total = 1.0 / float(self._scale(self.logits).softmax(-1).amax())
            for depth in _NUCLEUS_DEPTHS:
                ids, scaled = self._within(depth)
                ids, scaled = search.keep(scaled >= -depth, ids, scaled)
                bound = _nucleus(scaled, total, p)
                if bound > -math.inf:
                    break
            floor = max(floor, bound)
        else:
            ids, scaled = self._within(-floor)
            if min_p <= 0:
                return ids, scaled
        return search.keep(scaled >= min(floor, 0.0), ids, scaled)

    def _scale(self, values: Tensor) -> Tensor:
        return (values - self.largest).div_(self.temperature)

    def _within(self, depth: float) -> tuple[Tensor, Tensor]:
        """Return ids and scaled logits of a set of tokens that holds every scaled logit >= -depth."""
        ids, values = search.at_least(self.logits, self.maxima, self.largest - depth * self.temperature * (1 + _SLACK))
        return ids, self._scale(values)


def _nucleus(scaled: Tensor, total: float, p: float) -> float:
    """Return the largest bound whose survivors among `scaled` hold the share `p` of `total`; -inf if all hold less.

    `total` is the sum of exp over the distribution that `scaled` [N] is the upper part of.
    """
    values = scaled.sort(descending=True).values
    reached = values.double().exp_().cumsum_(0) >= p * total
    return float(values[reached.int().argmax()]) if bool(reached[-1]) else -math.inf


def _best(ids: Tensor, scaled: Tensor, key: int, best_noise: float) -> int:
    """Return the token with the highest `scaled + noise`; the one with scaled 0 is among `ids` and has `best_noise`.

    To beat it, a token needs either a logit close to its score or a rare, high noise, which shows in the integer bits.
    Only for these are the logarithms computed.
    """
    bits = noise_bits(key, ids)
    near = (scaled >= best_noise - _HIGH_NOISE - _SLACK) | (bits >= _HIGH_NOISE_BITS)
    at = near.nonzero().flatten()
    scores = scaled.index_select(0, at).double() + gumbel(bits.index_select(0, at))
    return int(ids[at[scores.argmax()]])


def _log_normaliser(logits: Tensor) -> Tensor:
    """Return logsumexp of each row, by way of the fused softmax, which is several times as fast as logsumexp."""
    chunks = logits.split(max(1, _CHUNK_ELEMENTS // logits.shape[1]))  # type: ignore[no-untyped-call]
    return torch.cat([chunk.amax(-1) - chunk.softmax(-1).amax(-1).log() for chunk in chunks])
