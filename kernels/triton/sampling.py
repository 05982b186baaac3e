"""Drawing the next token: every row cut into tiles, so that one row alone still fills the device.

The launches of a draw: statistics of each tile; the thresholds of top-k and top-p (see `threshold`); the best token of
each tile; the best of these, and its log-probability. With top log-probabilities come two more: the k largest of each
tile, and their merge. Nothing depends on the other rows of the batch, and no sum on the order of programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels import workspaces
from scalellm.kernels.launch import Launch
from scalellm.kernels.reference.sampling import SampleOutput
from scalellm.kernels.triton import threshold
from scalellm.kernels.triton.noise import gumbel32, gumbel64, noise_bits, noise_key
from scalellm.kernels.triton.threshold import float_of, is_drawn, key_of, row_peak, scaled_logits

_SEARCH_BLOCK = 1024
_LOWEST: tl.constexpr = tl.constexpr(-9223372036854775808)


@triton.jit
def _tile_stats(
    logits,
    source,
    floats,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    FLOATS: tl.constexpr,
):
    """Planes of `stats`: maximum and its first token; maximum and sum of exp of the logits for log-probabilities."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * STRIDE + ids, mask=ids < V, other=float("-inf"))
    y = x
    if source is not None:
        y = tl.load(source + row * SOURCE_STRIDE + ids, mask=ids < V, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))  # a row with a NaN has no finite maximum
    largest = tl.max(x, axis=0)
    first = tl.min(tl.where(x == largest, ids, V - 1), axis=0)
    y_largest = tl.max(y, axis=0)
    total = tl.sum(tl.exp(y - tl.where(y_largest == float("-inf"), 0.0, y_largest)), axis=0)
    at = floats + row * FLOATS + tile
    tl.store(at, largest)
    tl.store(at + TILES, first.to(tl.float32, bitcast=True))
    tl.store(at + 2 * TILES, y_largest)
    tl.store(at + 3 * TILES, total)


@triton.jit
def _log_normaliser(stats, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr):
    tiles = tl.arange(0, BLOCK_TILES)
    largest = tl.load(stats + 2 * TILES + tiles, mask=tiles < TILES, other=float("-inf"))
    total = tl.load(stats + 3 * TILES + tiles, mask=tiles < TILES, other=0.0)
    peak = tl.max(largest, axis=0)
    return peak + tl.log(tl.sum(tl.where(total > 0, total * tl.exp(largest - peak), 0.0), axis=0))


@triton.jit
def _tile_draw(
    logits,
    temperature,
    min_p,
    seeds,
    positions,
    floats,
    ints,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FLOATS: tl.constexpr,
    INTS: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row)
    peak = row_peak(floats + row * FLOATS, TILES, BLOCK_TILES)
    if is_drawn(heat, peak):
        ids = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits + row * STRIDE + ids, mask=ids < V, other=float("-inf"))
        scaled = scaled_logits(x, peak, heat)
        share = tl.load(min_p + row)
        lowest = tl.where(share > 0, tl.log(tl.where(share > 0, share, 1.0)), float("-inf"))
        kept = (x >= tl.load(floats + row * FLOATS + 5 * TILES + CANDIDATES + 1)) & ((scaled >= lowest) | (x == peak))
        noise = gumbel32(noise_bits(noise_key(tl.load(seeds + row), tl.load(positions + row)), ids))
        score = tl.where(kept, scaled + noise, float("-inf"))
        best = tl.max(score, axis=0)
        tl.store(floats + row * FLOATS + 4 * TILES + tile, best)
        tl.store(ints + row * INTS + TILES + tile, tl.min(tl.where(score == best, ids, V - 1), axis=0))


@triton.jit
def _finish(
    logits,
    source,
    temperature,
    seeds,
    positions,
    floats,
    ints,
    token_ids,
    logprobs,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    SOURCE_STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    FLOATS: tl.constexpr,
    INTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    stats = floats + row * FLOATS
    peak = row_peak(stats, TILES, BLOCK_TILES)
    tiles = tl.arange(0, BLOCK_TILES)
    live = tiles < TILES
    if is_drawn(heat, peak):
        # The tiles' winners are compared in float64: between tiles, the draw is the reference's to the last bit.
        ids = tl.load(ints + row * INTS + TILES + tiles, mask=live, other=0)
        running = live & (tl.load(stats + 4 * TILES + tiles, mask=live, other=float("-inf")) > float("-inf"))
        x = tl.load(logits + row * STRIDE + ids, mask=running, other=0.0)
        bits = noise_bits(noise_key(tl.load(seeds + row), tl.load(positions + row)), ids)
        score = scaled_logits(x, peak, heat).to(tl.float64) + gumbel64(bits)
        score = tl.where(running, score, float("-inf"))
        token = tl.min(tl.where(score == tl.max(score, axis=0), ids, V - 1), axis=0)
    else:
        largest = tl.load(stats + tiles, mask=live, other=float("-inf"))
        first = tl.load(stats + TILES + tiles, mask=live, other=0.0).to(tl.int32, bitcast=True)
        token = tl.min(tl.where(live & (largest == peak), first, V - 1), axis=0)
    tl.store(token_ids + row, token.to(tl.int64))
    if source is not None:
        value = tl.load(source + row * SOURCE_STRIDE + token)
    else:
        value = tl.load(logits + row * STRIDE + token)
    tl.store(logprobs + row, value - _log_normaliser(stats, TILES, BLOCK_TILES))


@triton.jit(do_not_specialize=["k"])
def _tile_top(source, top, k, V: tl.constexpr, STRIDE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """Write the k largest logits of the tile, descending, as integers that order as (logit, lowest token first) do."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    x = tl.load(source + row * STRIDE + ids, mask=ids < V, other=float("-inf"))
    x = tl.where(x == 0, 0.0, x)  # -0 and 0 are equal
    packed = (key_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    packed = tl.where(ids < V, packed, _LOWEST)
    at = top + (row * TILES + tile) * k
    for i in range(k):
        best = tl.max(packed, axis=0)
        tl.store(at + i, best)
        packed = tl.where(packed == best, _LOWEST, packed)


@triton.jit(do_not_specialize=["k"])
def _merge_top(
    top,
    floats,
    top_ids,
    top_logprobs,
    k,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    FLOATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    log_z = _log_normaliser(floats + row * FLOATS, TILES, BLOCK_TILES)
    tiles = tl.arange(0, BLOCK_TILES)
    taken = tl.zeros([BLOCK_TILES], tl.int32)
    lists = top + (row * TILES + tiles) * k
    for i in range(k):
        heads = tl.load(lists + taken, mask=(tiles < TILES) & (taken < k), other=_LOWEST)
        best = tl.max(heads, axis=0)
        taken += (heads == best).to(tl.int32)
        tl.store(top_ids + row * k + i, 0x7FFFFFFF - (best & 0x7FFFFFFF))
        tl.store(top_logprobs + row * k + i, float_of((best >> 32).to(tl.int32)) - log_z)


def sample(
    launch: Launch,
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
    """Draw as the reference does.

    The noise of a token is computed in float32 until each tile has one winner: where two tokens of a tile score within
    1e-6 of each other, the reference may draw the other one. The draw remains a function of its row alone.
    """
    rows, vocab = logits.shape
    num_logprobs = num_logprobs or 0
    tiles = triton.cdiv(vocab, workspaces.SAMPLE_TILE)
    if workspace is None:
        size = workspaces.sample_workspace_size(rows, vocab, num_logprobs)
        workspace = torch.empty(size, dtype=torch.int64, device=logits.device)
    if out is None:
        out = SampleOutput(
            torch.empty(rows, dtype=torch.int64, device=logits.device),
            torch.empty(rows, dtype=torch.float32, device=logits.device),
            torch.empty((rows, num_logprobs), dtype=torch.int64, device=logits.device),
            torch.empty((rows, num_logprobs), dtype=torch.float32, device=logits.device),
        )
    long_size, float_size, int_size = workspaces.sample_row_sizes(tiles)
    ends = rows * long_size, rows * (long_size + float_size), rows * (long_size + float_size + int_size)
    longs, top = workspace[: ends[0]], workspace[ends[2] :]
    floats, ints = workspace[ends[0] : ends[1]].view(torch.float32), workspace[ends[1] : ends[2]].view(torch.int32)

    block_tiles = triton.next_power_of_2(tiles)
    row = {"V": vocab, "STRIDE": logits.stride(0), "TILES": tiles}
    sources = {"SOURCE_STRIDE": 0 if logprob_logits is None else logprob_logits.stride(0)}
    split, blocks = {"TILE": workspaces.SAMPLE_TILE}, {"BLOCK_TILES": block_tiles}
    of_floats, of_ints, of_longs = {"FLOATS": 2 * float_size}, {"INTS": 2 * int_size}, {"LONGS": long_size}
    room = {"CANDIDATES": workspaces.SAMPLE_CANDIDATES}
    grid = rows, tiles

    launch(_tile_stats, grid, logits, logprob_logits, floats, **row, **sources, **split, **of_floats)
    filters = temperature, top_k, top_p
    areas = {**of_floats, **of_ints, **of_longs}
    searched = *filters, floats, ints, longs
    for again in (False, True):
        launch(threshold.tile_pivots, grid, logits, *searched, **row, **split, **blocks, **room, **areas, AGAIN=again)
        launch(
            threshold.choose,
            (rows,),
            *searched,
            num_warps=8,
            V=vocab,
            TILES=tiles,
            **blocks,
            **room,
            **areas,
            AGAIN=again,
        )
    launch(threshold.compact, grid, logits, floats, ints, **row, **split, **room, **of_floats, **of_ints)
    launch(
        threshold.search, (rows,), logits, *searched, num_warps=8, **row, **blocks, **room, **areas, BLOCK=_SEARCH_BLOCK
    )
    noise = seeds, positions, floats, ints
    launch(
        _tile_draw, grid, logits, temperature, min_p, *noise, **row, **split, **blocks, **room, **of_floats, **of_ints
    )
    results = out.token_ids, out.logprobs
    launch(
        _finish,
        (rows,),
        logits,
        logprob_logits,
        temperature,
        *noise,
        *results,
        **row,
        **sources,
        **blocks,
        **of_floats,
        **of_ints,
    )
    if num_logprobs:
        source = logits if logprob_logits is None else logprob_logits
        launch(_tile_top, grid, source, top, num_logprobs, V=vocab, STRIDE=source.stride(0), TILES=tiles, **split)
        found = floats, out.top_ids, out.top_logprobs, num_logprobs
        launch(_merge_top, (rows,), top, *found, TILES=tiles, **blocks, **of_floats)
    return out
