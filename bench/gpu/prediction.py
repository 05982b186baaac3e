"""Predicted times of decode steps on an H200, from bytes, launches and waves: to be compared with a run.

    python -m bench.gpu.roofline --predict

A step is its products, its attention, its small kernels and the gaps between all of them. Each moves the bytes that
`roofline` counts, at a share of the bandwidth that is assumed here, in `Design`, for three states of the code: before
the first review of the compiled kernels, now, and with what is still open. None of it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, comb
from types import MappingProxyType

from bench.gpu.roofline import (
    ASSUMED,
    H200_TARGETS,
    LLAMA_8B,
    MIXTRAL,
    Cost,
    ModelShape,
    Precision,
    decode_attention,
    experts_hit,
    linear,
    step_floor_us,
)
from scalellm.kernels import Capability
from scalellm.kernels.reference.linear import SQUARED_TOGETHER
from scalellm.kernels.tiles import tile_table
from scalellm.kernels.workspaces import BYTES_AHEAD, ROWS_AHEAD

_CONTEXT = 1024
_LONG = 100_000  # tokens of one sequence among short ones
_SMS, _GHZ = 132, 1.755
_ISSUE_RATE = 0.6  # instructions of a scheduler in a cycle, in a loop that waits for shared memory and conversions
_SHARED = 228 << 10  # bytes of a processor
_H200 = Capability(90, _SMS, "NVIDIA H200")
_CHAIN_US = 2.0  # of a program of attention: length, block id, first keys, one after the other
_SMALLEST_US = 2.2  # a kernel that moves next to nothing
_LATENCY_US = 1.0  # of a load of keys, where others load as well: a program has its buffers filled once in that time
_LAST_US = 0.8  # of the last program of a sequence's attention: a ticket, and shares from L2
_TAIL_US = 0.9  # of a product that is streamed: its last tiles, while memory has nothing to do
_OVERLAPPED_US = 0.7  # what is left of the gap before a kernel that begins early
_SAMPLER_US = 30.0  # and the copies around a step
_ADDED_TO_PRODUCTS = 3  # launches of a layer: both norms and the activation
_O, _GATE_UP = 1, 2  # of the products of a layer
_ROWS: tuple[tuple[str, ModelShape, Precision, tuple[int, ...]], ...] = (
    ("llama-3.1-8b", LLAMA_8B, "bf16", (1, 16, 64, 256)),
    ("llama-3.1-8b", LLAMA_8B, "fp8", (1, 64, 256)),
    ("llama-3.1-8b", LLAMA_8B, "int4", (1, 64)),
    ("mixtral-8x7b", MIXTRAL, "fp8", (64,)),
)


@dataclass(frozen=True, slots=True)
class Design:
    """A state of the code. Shares are of the ceiling.

    Attributes:
        name: of the column.
        products: the share of products by precision, with one row and with many.
        attention_bytes: shared memory of a program of decode attention, by bytes of a cache's element (`make aot`).
        attention_share: of bandwidth, in a loop with so many loads under way.
        most_shares: of the keys of one long sequence in a batch of 64.
        e4m3_instructions: of a warp, for 64 keys and values of 128 e4m3 numbers (`nvdisasm`).
        expert_rows: rows of a block of an expert where the blocks of an expert read its weight one after the other;
            0 where they read it together.
        expert_instructions: of a warp of its four, for 8 KB of an expert's e4m3 numbers and 32 rows (`nvdisasm`).
        launches: of a layer beside its products, attention included.
        adds_shares_apart: one of them adds up the shares of attention.
        overlapping: of those launches, the ones that begin while the kernel before them ends.
        gap_us: between two kernels of a graph.
        streamed_rows: up to so many rows, by precision, products of our own stream the weight. Their launches overlap.
        streamed_share: of bandwidth, while they do; `streamed_ends_us` is what each takes besides.
        second_level: GB/s of that cache, out of which their programs read the weight, and the whole input each.
        fused_rows: up to so many rows, by precision, a dense layer has norms, activation, additions and quantisation in
            these products.
        wide_rows: up to so many rows, by precision, the weight of gate and up is streamed as well, a layer's widest.
        packed_overlap: the products of int4 and the sums of their shares begin early, too.
        ahead_bytes: of the weight of a product that are fetched while the kernel before it leaves memory idle: by the
            product if it streams, else by that kernel, where that is a norm, an activation or a quantisation.
    """

    name: str
    products: Mapping[Precision, tuple[float, float]]
    attention_bytes: Mapping[int, int]
    attention_share: float
    most_shares: int
    e4m3_instructions: int
    expert_rows: int
    expert_instructions: int
    launches: int
    adds_shares_apart: bool
    overlapping: int
    gap_us: float
    streamed_rows: Mapping[Precision, int]
    fused_rows: Mapping[Precision, int]
    wide_rows: Mapping[Precision, int]
    packed_overlap: bool = False
    streamed_share: float = 1.0
    streamed_ends_us: float = 0.0
    second_level: float = float("inf")
    ahead_bytes: int = 0


BEFORE = Design(
    "before",
    MappingProxyType({"bf16": (0.80, 0.77), "fp8": (0.66, 0.62), "int4": (0.50, 0.25)}),
    MappingProxyType({2: 38_916, 1: 22_532}),
    attention_share=0.85,
    most_shares=4,
    e4m3_instructions=798,
    expert_rows=16,
    expert_instructions=394,
    launches=6,
    adds_shares_apart=True,
    overlapping=0,
    gap_us=1.2,
    streamed_rows=MappingProxyType({}),
    fused_rows=MappingProxyType({}),
    wide_rows=MappingProxyType({}),
)
# int4 with interleaved rows: a warp issues 375 instructions for 4 KB of words with up to 16 rows, 623 with 64
# (`nvdisasm`). As it meets 3 barriers there and no longer 19, it is assumed to use nine of ten slots.
NOW = replace(
    BEFORE,
    name="now",
    products=MappingProxyType({**BEFORE.products, "int4": (0.53, 0.32)}),
    attention_bytes=MappingProxyType({2: 71_680, 1: 38_912}),
    attention_share=0.90,
    most_shares=61,
    e4m3_instructions=618,
    expert_rows=0,
    expert_instructions=313,  # weights as the left operand, and widened by way of float32
    launches=5,
    adds_shares_apart=False,
    overlapping=5,  # both norms, rotation, attention and activation; cuBLAS launches its products as ever
    packed_overlap=True,
    # `kernels.fused_linear` and `fp8_gemm`: 48 KB of weights or more are under way to a program, and a warp issues 264
    # instructions for 16 KB (`make aot`, `cuobjdump`), for which memory takes 880 cycles of a processor. So a product
    # streams at 95 %; it begins with a chain of loads, 1.0 us, and ends with its last tiles.
    streamed_rows=MappingProxyType({"bf16": 16, "fp8": 16}),
    # With up to 64 rows two warps of a scheduler issue 334 instructions for 32 KB of 256 rows, for which memory takes
    # 1,760 cycles, or 1,500 where it serves 112 programs; matrix units take 512; 96 KB are under way.
    wide_rows=MappingProxyType({"fp8": 64}),
    streamed_share=0.95,
    streamed_ends_us=1.0 + _TAIL_US,
    second_level=5500.0,
    ahead_bytes=BYTES_AHEAD,
    fused_rows=MappingProxyType({"bf16": 16}),
)
# Norms, activation, additions and quantisation in products of e4m3 as well, and of up to 64 rows, in tiles that the
# second-level cache keeps up with; int4 unpacked two numbers at a time.
OPEN = replace(
    NOW,
    name="with what is open",
    products=MappingProxyType({"bf16": (0.80, 0.84), "fp8": (0.85, 0.82), "int4": (0.75, 0.60)}),
    streamed_rows=MappingProxyType({"bf16": 64, "fp8": 64}),
    fused_rows=MappingProxyType({"bf16": 64, "fp8": 64}),
    second_level=float("inf"),
)
_FEWER_LAUNCHES = replace(
    NOW, launches=NOW.launches - _ADDED_TO_PRODUCTS, overlapping=NOW.launches - _ADDED_TO_PRODUCTS
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction of a decode step: least and expected milliseconds, launches, and waves of attention's programs."""

    floor_ms: float
    ms: float
    launches: int
    waves: float


def rereads(tokens: int, experts: int, choices: int, block_rows: int) -> float:
    """Return how often the weight of an expert that is hit is read when each block of its rows reads it anew."""
    p = choices / experts
    odds = [comb(tokens, n) * p**n * (1 - p) ** (tokens - n) for n in range(tokens + 1)]
    return sum(ceil(n / block_rows) * odd for n, odd in enumerate(odds)) / (1 - odds[0])


def predict(shape: ModelShape, precision: Precision, seqs: int, design: Design) -> Prediction:
    """Predict a decode step of `seqs` sequences with 1024 tokens each, sampling included."""
    kv_bytes = 1 if precision == "fp8" else 2
    beside, overlapping, share = design.launches, design.overlapping, design.products[precision][seqs > 1]
    attention_width = shape.q_heads * shape.head_dim
    products = [(shape.hidden, shape.qkv_columns), (attention_width, shape.hidden)]
    if not shape.experts:
        products += [(shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)]
    fused = is_fused(shape, precision, seqs, design)
    if fused:
        beside = overlapping = NOW.launches - _ADDED_TO_PRODUCTS
    us = 0.0
    for i, ((inner, columns), idle_us) in enumerate(zip(products, _idle_before(fused), strict=False)):
        cost = linear(seqs, inner, columns, precision)
        is_wide = i == _GATE_UP and seqs <= design.wide_rows.get(precision, 0)
        if is_wide or seqs <= design.streamed_rows.get(precision, 0):
            overlapping += 1
            from_memory = cost.floor_us(ASSUMED) / design.streamed_share - _ahead_us(cost, idle_us, design)
            tile = _tile_rows(precision, seqs, columns) * (2 if fused and i == _GATE_UP else 1)
            us += max(from_memory, _from_cache_us(precision, seqs, inner, columns, tile, design))
            us += design.streamed_ends_us
        else:
            us += cost.floor_us(ASSUMED) / share
            # Attention comes before `o_proj`, and before that a quantisation where there is one.
            behind_small = precision == "fp8" or (precision == "bf16" and i != _O)
            if behind_small and ROWS_AHEAD[0] <= seqs <= ROWS_AHEAD[1]:
                us -= _ahead_us(cost, _SMALLEST_US + design.gap_us, design)
    launches = len(products) + beside
    if shape.experts:
        # Gate and up, and down, of every expert that is hit; routing and layout are five small kernels.
        weights = experts_hit(shape, seqs) * 3 * shape.hidden * shape.intermediate * (1 if precision == "fp8" else 2)
        times = rereads(seqs, shape.experts, shape.choices, design.expert_rows) if design.expert_rows else 1.0
        if precision == "fp8":
            share = _expert_share(design)
        us += ASSUMED.move_us(weights * times) / share + 5 * _SMALLEST_US
        launches += 2 + 5
    attention, waves = _attention_us(shape, seqs, kv_bytes, design)
    small = beside - 1 - design.adds_shares_apart
    us += attention + small * max(_SMALLEST_US, ASSUMED.move_us(8.0 * seqs * shape.hidden) / 0.8)
    # Attention's output is quantised by itself; norms and activations quantise what they write.
    if precision == "fp8" and not fused:
        launches, overlapping = launches + 1, overlapping + bool(design.overlapping)
        us += max(_SMALLEST_US, ASSUMED.move_us(3.0 * seqs * attention_width) / 0.8)
    if precision == "int4":
        launches += 3  # shares of products are added
        overlapping += (len(products) + 3) * design.packed_overlap
        us += 3 * _SMALLEST_US
    us += (launches - overlapping) * design.gap_us + overlapping * _OVERLAPPED_US
    head = linear(seqs, shape.hidden, shape.vocab, "bf16").floor_us(ASSUMED) / 0.9
    sampling = _SAMPLER_US + 2 * ASSUMED.move_us(4.0 * seqs * shape.vocab)
    floor = step_floor_us(shape, ASSUMED, seqs=seqs, context=_CONTEXT, precision=precision, kv_bytes=kv_bytes)
    return Prediction(floor / 1e3, (us * shape.layers + head + sampling) / 1e3, launches * shape.layers, waves)


def is_fused(shape: ModelShape, precision: Precision, seqs: int, design: Design) -> bool:
    """True if a step of so many rows has what is around its products in them."""
    return not shape.experts and seqs <= design.fused_rows.get(precision, 0)


def _idle_before(fused: bool) -> tuple[float, float, float, float]:
    """Return how long memory is idle before each product of a dense layer, the gap included, in microseconds.

    Before it comes a small kernel; in a fused layer attention before `o_proj`, before the others a product.
    """
    idle = (_TAIL_US, _CHAIN_US + _LAST_US, _TAIL_US, _TAIL_US) if fused else (_SMALLEST_US,) * 4
    qkv, o, gate_up, down = (us + _OVERLAPPED_US for us in idle)
    return qkv, o, gate_up, down


def _ahead_us(cost: Cost, idle_us: float, design: Design) -> float:
    """Return what a product that waits for its weight saves by what is fetched of it while memory is idle."""
    if not cost.is_bandwidth(ASSUMED):
        return 0.0
    return min(idle_us, ASSUMED.move_us(min(design.ahead_bytes, cost.num_bytes)))


def _tile_rows(precision: Precision, rows: int, columns: int) -> int:
    """Return how many rows of a weight a program multiplies with the whole input, in the kernels of our own."""
    if precision == "bf16":
        return SQUARED_TOGETHER
    return tile_table("fp8_gemm", _H200).choose(rows=rows, columns=columns)["block_n"]


def _from_cache_us(precision: Precision, rows: int, inner: int, columns: int, tile_rows: int, design: Design) -> float:
    """Return how long the second-level cache takes for what the programs of a product read: their weight and input."""
    size = 1 if precision == "fp8" else 2
    return size * inner * (columns + rows * columns / tile_rows) / (design.second_level * 1e3)


def _expert_share(design: Design) -> float:
    """Return the share of bandwidth at which e4m3 experts are read: instructions have to keep up with memory."""
    memory_us = 8192 / (ASSUMED.read * 1e3 / _SMS)
    issue_us = design.expert_instructions / (_ISSUE_RATE * _GHZ * 1e3)
    return min(design.streamed_share, memory_us / issue_us) if issue_us else design.streamed_share


def at_share(design: Design, precision: Precision, share: float) -> Design:
    """Return a design whose products all run at a share of the ceiling, and have nothing hidden before them."""
    products = MappingProxyType({**design.products, precision: (share, share)})
    bare = replace(design, streamed_ends_us=0.0, ahead_bytes=0, expert_instructions=0, second_level=float("inf"))
    return replace(bare, products=products, streamed_share=share)


def needed_share(shape: ModelShape, precision: Precision, seqs: int, design: Design, rate: float) -> float:
    """Return the share of the ceiling at which products have to run for so many tokens per second.

    Of 1 and more, the rate is out of reach whatever is done to products.
    """

    def ms(share: float) -> float:
        return predict(shape, precision, seqs, at_share(design, precision, share)).ms

    at_ceiling, at_half = ms(1.0), ms(0.5)  # a + b and a + 2 b
    of_products = at_half - at_ceiling
    left = 1e3 * seqs / rate - (at_ceiling - of_products)
    return of_products / left if left > 0 else float("inf")


def _attention_us(shape: ModelShape, seqs: int, kv_bytes: int, design: Design) -> tuple[float, float]:
    """Return microseconds and waves of decode attention.

    A share has 128 keys now; before, it had 256, or 64 with few sequences.
    """
    num_bytes = decode_attention(shape, seqs, _CONTEXT, kv_bytes).num_bytes
    resident = _SHARED // (design.attention_bytes[kv_bytes] + 1024)
    before = 256 if seqs * shape.kv_heads >= _SMS else 64
    shares = _CONTEXT // (before if design.adds_shares_apart else 128)
    programs = seqs * shape.kv_heads * shares
    us = ASSUMED.move_us(num_bytes) / design.attention_share
    if kv_bytes == 1:
        tiles = seqs * shape.kv_heads * _CONTEXT / 64
        # The four warps of a program are on the four schedulers of a processor.
        us = max(us, tiles * design.e4m3_instructions / _ISSUE_RATE / (_SMS * _GHZ * 1e3))
    adding = _SMALLEST_US if design.adds_shares_apart else _LAST_US
    return us + _CHAIN_US + adding, programs / (_SMS * resident)


def lone_row_us(shape: ModelShape, context: int, design: Design) -> float:
    """Return microseconds of a layer's decode attention for a sequence of `context` tokens among 63 of 1024.

    It takes the time of all bytes, or that of one share of the long sequence where a program reads that for longer.
    """
    lone = decode_attention(shape, 1, context, 2).num_bytes
    all_bytes = lone + decode_attention(shape, 63, _CONTEXT, 2).num_bytes
    share = lone / (shape.kv_heads * design.most_shares)
    us = max(ASSUMED.move_us(all_bytes) / design.attention_share, share / design.attention_bytes[2] * _LATENCY_US)
    return us + _CHAIN_US + (_SMALLEST_US if design.adds_shares_apart else _LAST_US)


def table() -> str:
    """Return the predictions as text."""
    designs = (BEFORE, NOW, OPEN)
    columns = "".join(f"{design.name:>32}" for design in designs)
    lines = [
        "A decode step on an H200, 1k of context, on paper: milliseconds, share of the least, tokens per second.",
        f"{'':30}{'floor':>7}{columns}  target",
    ]
    for name, shape, precision, batches in _ROWS:
        for seqs in batches:
            found = [predict(shape, precision, seqs, design) for design in designs]
            target = H200_TARGETS.get((name, precision, seqs))
            cells = ""
            for p in found:
                rate = 1e3 * seqs / p.ms
                mark = "" if target is None else "+" if rate >= target else "-"
                cells += f"{p.ms:>11.1f}{p.floor_ms / p.ms:>7.0%}{rate:>12,.0f}{mark:>2}"
            floor, wanted = found[0].floor_ms, "" if target is None else f"{target:,}"
            lines.append(f"{name:14} {precision:5} at {seqs:<6}{floor:>7.2f}{cells}  {wanted}".rstrip())
            if target is not None and 1e3 * seqs / found[1].ms < target:
                alone, fused = (
                    needed_share(shape, precision, seqs, design, target) for design in (NOW, _FEWER_LAUNCHES)
                )
                lines.append(
                    f"{'':37}the target takes products at {alone:.0%}, or {fused:.0%} with norm and activation in them;"
                    f" {NOW.products[precision][seqs > 1]:.0%} is assumed now"
                )
            lines.append(
                f"{'':37}" + "".join(f"{p.launches:>14} launches{p.waves:>7.1f} waves  " for p in found).rstrip()
            )
    for kv_heads in (8, 2):
        shape = replace(LLAMA_8B, kv_heads=kv_heads, q_heads=4 * kv_heads)
        cells = "".join(f"{lone_row_us(shape, _LONG, design):>29.0f} us" for design in designs)
        lines.append(f"attention {kv_heads} kv heads, {_LONG // 1000}k among 1k{'':4}{cells}")
    lines.append("+ reaches its target, - misses it. What is assumed stands in bench/gpu/prediction.py.")
    return "\n".join(lines)
