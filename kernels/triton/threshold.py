"""The lowest logit that survives top-k and top-p, exactly and without a sort.

A row is narrowed down in six launches, those over its tiles so that few rows still fill the device: `tile_pivots`
counts each tile's logits above 16 depths below the maximum; `choose` takes the shallowest depth that holds everything
the filters can keep. Where too many logits lie between this depth and the one before (a flat distribution, or top-k at
a low temperature), both go on once more with 16 depths between these two. `compact` copies the logits between the two
chosen depths, a few hundred as a rule, to a buffer; and `search` bisects the bit patterns of floats over that buffer,
or over the row itself where it is still too small (thousands of equal logits: correct, and slower). Rows without these
filters leave every launch at once.

Probabilities are summed as integers, in units of 2**-40 of the largest: such sums do not depend on their order, so
neither the tiling nor the buffer can change which token is the last one kept.
"""

import triton
import triton.language as tl

from scalellm.kernels.workspaces import SAMPLE_PIVOTS

NUM_PIVOTS: tl.constexpr = tl.constexpr(SAMPLE_PIVOTS)
_SUBTILE: tl.constexpr = tl.constexpr(128)
_MASS_UNIT: tl.constexpr = tl.constexpr(1099511627776.0)


@triton.jit
def row_peak(stats, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """Return the maximum of a row from the maxima of its tiles, the first plane of its `stats`."""
    tiles = tl.arange(0, BLOCK_TILES)
    return tl.max(tl.load(stats + tiles, mask=tiles < TILES, other=float("-inf")), axis=0)


@triton.jit
def is_drawn(temperature, peak):
    """True if a row is drawn from at all, rather than greedy."""
    return (temperature > 0) & (peak > float("-inf")) & (peak < float("inf"))


@triton.jit
def _is_searched(temperature, peak, k, p, V: tl.constexpr):
    return is_drawn(temperature, peak) & (((k > 0) & (k < V)) | (p < 1.0))


@triton.jit
def scaled_logits(x, peak, temperature):
    """Return (x - peak) / temperature, rounded as the reference rounds it."""
    return tl.div_rn(x - peak, tl.zeros_like(x) + temperature)


@triton.jit
def _mass(x, peak, temperature):
    return (tl.exp(scaled_logits(x, peak, temperature)) * _MASS_UNIT).to(tl.int64)


@triton.jit
def _pivots(peak, temperature):
    """Return the bounds, descending: from 1/8 to 16 temperatures below the peak, and -inf."""
    i = tl.arange(0, NUM_PIVOTS)
    depths = 0.125 * tl.exp2(0.5 * i.to(tl.float32))
    # Rounded once, by name: two kernels must arrive at the same bounds, whatever the compiler would contract in each.
    bounds = tl.fma(tl.zeros_like(depths) - temperature, depths, tl.zeros_like(depths) + peak)
    return tl.where(i == NUM_PIVOTS - 1, float("-inf"), bounds)


@triton.jit
def _between(low, high, peak, temperature):
    """Return bounds, descending from `high` to `low`; towards -inf they double their depth below the peak every two."""
    i = tl.arange(0, NUM_PIVOTS)
    step = tl.where(low > float("-inf"), high - low, 0.0) / (NUM_PIVOTS - 1)
    within = high - step * i.to(tl.float32)
    beyond = peak - (peak - high) * tl.exp2(0.5 * i.to(tl.float32))
    bounds = tl.where(low > float("-inf"), within, beyond)
    return tl.where(i == NUM_PIVOTS - 1, low, tl.where(i == 0, high, bounds))


@triton.jit
def tile_pivots(
    logits,
    temperature,
    top_k,
    top_p,
    floats,
    ints,
    longs,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FLOATS: tl.constexpr,
    INTS: tl.constexpr,
    LONGS: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Write count and mass of the tile above each bound, `AGAIN` those that `choose` left; grid (rows, tiles)."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature + row)
    peak = row_peak(floats + row * FLOATS, TILES, BLOCK_TILES)
    if AGAIN:
        wanted = tl.load(ints + row * INTS + 2 * TILES) < 0
    else:
        wanted = _is_searched(heat, peak, tl.load(top_k + row), tl.load(top_p + row), V)
    if wanted:
        if AGAIN:
            bounds = tl.load(floats + row * FLOATS + 5 * TILES + CANDIDATES + 3 + tl.arange(0, NUM_PIVOTS))
        else:
            bounds = _pivots(peak, heat)
        count = tl.zeros([_SUBTILE, NUM_PIVOTS], tl.int32)
        mass = tl.zeros([_SUBTILE, NUM_PIVOTS], tl.int64)
        for start in range(0, TILE, _SUBTILE):
            ids = tile * TILE + start + tl.arange(0, _SUBTILE)
            x = tl.load(logits + row * STRIDE + ids, mask=ids < V, other=float("-inf"))
            above = (x[:, None] >= bounds[None, :]) & (ids < V)[:, None]
            count += above.to(tl.int32)
            mass += tl.where(above, _mass(x, peak, heat)[:, None], 0)
        at = longs + row * LONGS + tile * 2 * NUM_PIVOTS + tl.arange(0, NUM_PIVOTS)
        tl.store(at, tl.sum(count, axis=0).to(tl.int64))
        tl.store(at + NUM_PIVOTS, tl.sum(mass, axis=0))


@triton.jit
def choose(
    temperature,
    top_k,
    top_p,
    floats,
    ints,
    longs,
    V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FLOATS: tl.constexpr,
    INTS: tl.constexpr,
    LONGS: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Choose the bounds of what is searched, and each tile's place in the buffer; grid (rows,).

    Left for the others: how many logits are between the bounds, -1 where they are too many for the buffer; the lower
    bound, which is enough, and the upper one, which is not, or infinity; count and mass above the upper one.
    """
    row = tl.program_id(0).to(tl.int64)
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    peak = row_peak(floats + row * FLOATS, TILES, BLOCK_TILES)
    places, bounds_at = ints + row * INTS, floats + row * FLOATS + 5 * TILES + CANDIDATES
    sums = longs + row * LONGS + TILES * 2 * NUM_PIVOTS
    if AGAIN:
        wanted = tl.load(places + 2 * TILES) < 0
    else:
        wanted = _is_searched(heat, peak, k, p, V)
    if wanted:
        tiles, pivots = tl.arange(0, BLOCK_TILES), tl.arange(0, NUM_PIVOTS)
        at = longs + row * LONGS + tiles[:, None] * 2 * NUM_PIVOTS + pivots[None, :]
        live = (tiles < TILES)[:, None]
        counts = tl.load(at, mask=live, other=0)
        count = tl.sum(counts, axis=0)
        mass = tl.sum(tl.load(at + NUM_PIVOTS, mask=live, other=0), axis=0)
        if AGAIN:
            bounds = tl.load(bounds_at + 3 + pivots)
            total = tl.load(sums)
        else:
            bounds = _pivots(peak, heat)
            total = tl.max(mass, axis=0)
        by_count = (k > 0) & (k < V)
        if by_count:
            enough = count >= k
        else:
            enough = mass.to(tl.float64) >= p.to(tl.float64) * total.to(tl.float64)
        pivot = tl.min(tl.where(enough, pivots, NUM_PIVOTS - 1), axis=0)
        low = tl.max(tl.where(pivots == pivot, bounds, float("-inf")), axis=0)
        before = tl.max(tl.where(pivots == pivot - 1, bounds, float("-inf")), axis=0)
        # With both filters, the second search goes up from where the first ends: to the peak.
        above = (pivots == pivot - 1) & ~(by_count & (p < 1.0))
        high = tl.where(tl.sum(above.to(tl.int32), axis=0) > 0, before, float("inf"))
        base_count, base_mass = tl.sum(tl.where(above, count, 0), axis=0), tl.sum(tl.where(above, mass, 0), axis=0)
        size = tl.sum(tl.where(pivots == pivot, count, 0), axis=0) - base_count
        size = tl.where(size > CANDIDATES, -1, size)
        mine = tl.sum(tl.where((pivots == pivot)[None, :], counts, 0) - tl.where(above[None, :], counts, 0), axis=1)
        tl.store(places + tiles, (tl.cumsum(mine, axis=0) - mine).to(tl.int32), mask=tiles < TILES)
        tl.store(bounds_at, low)
        tl.store(bounds_at + 2, high)
        if not AGAIN:
            tl.store(bounds_at + 3 + pivots, _between(low, tl.where(pivot > 0, before, peak), peak, heat))
            tl.store(sums, total)
        tl.store(sums + 1, base_count)
        tl.store(sums + 2, base_mass)
        tl.store(places + 2 * TILES, size.to(tl.int32))
    else:
        if not AGAIN:
            tl.store(places + 2 * TILES, 0)


@triton.jit
def compact(
    logits,
    floats,
    ints,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FLOATS: tl.constexpr,
    INTS: tl.constexpr,
):
    """Copy the tile's logits between the chosen bounds to the buffer; grid (rows, tiles)."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(ints + row * INTS + 2 * TILES) > 0:
        bounds_at = floats + row * FLOATS + 5 * TILES + CANDIDATES
        ids = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits + row * STRIDE + ids, mask=ids < V, other=float("-inf"))
        chosen = (x >= tl.load(bounds_at)) & (x < tl.load(bounds_at + 2)) & (ids < V)
        place = tl.load(ints + row * INTS + tile) + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(floats + row * FLOATS + 5 * TILES + place, x, mask=chosen)


@triton.jit
def key_of(x):
    """Return an i32 that is ordered as the float is."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of(key):
    """Return the float of a `key_of`, i32."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _count_from(source, n, bound, BLOCK: tl.constexpr):
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < n, other=float("-inf"))
        count += ((x >= bound) & (at < n)).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _mass_from(source, n, bound, peak, temperature, BLOCK: tl.constexpr):
    mass = tl.zeros([BLOCK], tl.int64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < n, other=float("-inf"))
        mass += tl.where(x >= bound, _mass(x, peak, temperature), 0)
    return tl.sum(mass, axis=0)


@triton.jit
def search(
    logits,
    temperature,
    top_k,
    top_p,
    floats,
    ints,
    longs,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FLOATS: tl.constexpr,
    INTS: tl.constexpr,
    LONGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the threshold of each row, -inf without filters; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    heat, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    peak = row_peak(floats + row * FLOATS, TILES, BLOCK_TILES)
    threshold = tl.full([], float("-inf"), tl.float32)
    if _is_searched(heat, peak, k, p, V):
        size = tl.load(ints + row * INTS + 2 * TILES)
        sums = longs + row * LONGS + TILES * 2 * NUM_PIVOTS
        total, base_count, base_mass = tl.load(sums), tl.load(sums + 1), tl.load(sums + 2)
        source = floats + row * FLOATS + 5 * TILES
        n = size
        low = key_of(tl.load(source + CANDIDATES)).to(tl.int64)
        upper = key_of(tl.load(source + CANDIDATES + 2)).to(tl.int64)
        if size < 0:
            source = logits + row * STRIDE
            n = tl.full([], V, tl.int32)
            base_count, base_mass = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        # Both searches keep: everything from `low` on is enough, and from beyond `high` on is not.
        highest = tl.minimum(key_of(peak).to(tl.int64), upper - 1)
        if (k > 0) & (k < V):
            high = highest
            while low < high:
                middle = (low + high + 1) >> 1
                count = base_count + _count_from(source, n, float_of(middle.to(tl.int32)), BLOCK)
                low = tl.where(count >= k, middle, low)
                high = tl.where(count == k, middle, tl.where(count > k, high, middle - 1))
            total = base_mass + _mass_from(source, n, float_of(low.to(tl.int32)), peak, heat, BLOCK)
        if p < 1.0:
            target = p.to(tl.float64) * total.to(tl.float64)
            high = highest
            while low < high:
                middle = (low + high + 1) >> 1
                mass = base_mass + _mass_from(source, n, float_of(middle.to(tl.int32)), peak, heat, BLOCK)
                enough = mass.to(tl.float64) >= target
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
        threshold = float_of(low.to(tl.int32))
    tl.store(floats + row * FLOATS + 5 * TILES + CANDIDATES + 1, threshold)
