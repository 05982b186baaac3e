"""Products with weights of 4 and 8 bits.

Of few rows, time is that of reading the weights, so they stay packed until they are in registers: the i-th numbers of
all words of a tile are multiplied with the columns of x that they belong to. In interleaved weights these columns lie
side by side and are copied 16 bytes at a time, while earlier tiles are multiplied; otherwise they are PACK apart, and
are loaded one by one when they are needed. The inner dimension is divided among programs until they fill the device;
the shares are added by a second launch in a fixed order, so that results are the same at every run.

With more than `max_rows` rows the weight is unpacked to the dtype of x and multiplied by `torch.mm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalellm.kernels.launch import Launch, next_power_of_2
from scalellm.kernels.reference.w4a16 import check_shapes
from scalellm.kernels.triton.overlap import start_after_the_kernel_before
from scalellm.kernels.workspaces import wna16_shares

_DEQUANTISE_BLOCK_N = 1024  # a thread moves 128 bits at a time


@triton.jit
def _unpacked(words, i, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return the i-th number of each word."""
    q = (words >> (i * BITS)) & ((1 << BITS) - 1)
    if BITS == 4 and dtype == tl.bfloat16:
        # 0x4300 | q is the bfloat16 128 + q: an operation on bits instead of a conversion, which is four times as slow.
        return (q | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return q.to(dtype)


@triton.jit
def packed_product(
    x_rows,
    live_rows,
    words,
    scales,
    zeros,
    columns,
    start_word,
    stop_word,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Return rows of x (pointers [BLOCK_M]) times these columns of the weight, over a range of its words.

    The range begins at a multiple of WORDS, which is a multiple of INTERLEAVE.
    """
    PACK: tl.constexpr = 32 // BITS
    dtype: tl.constexpr = x_rows.dtype.element_ty
    # Numbers come out of `_unpacked` this much too large.
    BIASED: tl.constexpr = BITS == 4 and dtype == tl.bfloat16
    EXCESS: tl.constexpr = 128 if BIASED else 0
    ZERO: tl.constexpr = 1 << (BITS - 1)
    # With one scale for all words of a tile, scale and zero point are applied to the product; else to the weight.
    UNIFORM: tl.constexpr = GROUP % (WORDS * PACK) == 0
    # Numbers i of all words of a tile are of one group, and so are those of the next ones, together EACH for a word.
    TOGETHER: tl.constexpr = WORDS == INTERLEAVE and GROUP % WORDS == 0 and WORDS * PACK % GROUP == 0
    LANES: tl.constexpr = 1 if TOGETHER else WORDS
    EACH: tl.constexpr = GROUP // WORDS if TOGETHER else (PACK if INTERLEAVE == 1 else 1)
    live_columns = (columns < N) | (N % BLOCK_N == 0)  # constant where it can be
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lane = tl.arange(0, WORDS)
    first = lane // INTERLEAVE * (INTERLEAVE * PACK) + lane % INTERLEAVE  # row of the weight of a word's lowest number
    for start in range(start_word, stop_word, WORDS):
        word = start + lane
        live = (word < K // PACK) | (K % (PACK * WORDS) == 0)
        at = words + word[:, None].to(tl.int64) * N + columns[None, :]
        packed = tl.load(at, mask=live[:, None] & live_columns[None, :], other=0)
        x_at = x_rows[:, None] + start * PACK + first[None, :]
        x_live = live_rows[:, None] & live[None, :]
        if UNIFORM:
            group = start * PACK // GROUP
            scale = tl.load(scales + group * N + columns, mask=live_columns, other=0.0).to(tl.float32)
            zero = tl.full([BLOCK_N], ZERO, tl.float32)
            if zeros is not None:
                zero = tl.load(zeros + group * N + columns, mask=live_columns, other=0.0).to(tl.float32)
            part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            sums = tl.zeros([BLOCK_M, WORDS], tl.float32)
            for i in tl.static_range(PACK):
                xi = tl.load(x_at + i * INTERLEAVE, mask=x_live, other=0.0)
                part = tl.dot(xi, _unpacked(packed, i, BITS, xi.dtype), part, input_precision="ieee")
                sums += xi.to(tl.float32)
            acc += (part - tl.sum(sums, axis=1)[:, None] * (zero + EXCESS)[None, :]) * scale[None, :]
        else:
            some = tl.arange(0, LANES)
            rows = start * PACK + some // INTERLEAVE * (INTERLEAVE * PACK) + some % INTERLEAVE
            live_groups = ((start + some) < K // PACK)[:, None] & live_columns[None, :]
            for i in tl.static_range(PACK):
                if i % EACH == 0:
                    group = ((rows + i * INTERLEAVE) // GROUP)[:, None] * N + columns[None, :]
                    scale = tl.load(scales + group, mask=live_groups, other=0.0).to(tl.float32)
                    zero = tl.full([LANES, BLOCK_N], ZERO, tl.float32)
                    if zeros is not None:
                        zero = tl.load(zeros + group, mask=live_groups, other=0.0).to(tl.float32)
                    shift = (zero + EXCESS) * scale
                xi = tl.load(x_at + i * INTERLEAVE, mask=x_live, other=0.0)
                weight = _unpacked(packed, i, BITS, xi.dtype).to(tl.float32) * scale - shift
                acc = tl.dot(xi, weight.to(xi.dtype), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["m"])
def _gemm_packed(
    x,
    words,
    scales,
    zeros,
    out,
    m,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SHARE: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Write a tile of the product, or with SHARES > 1 of one share of it, to `out` [SHARES, m, N]."""
    start_after_the_kernel_before(OVERLAPS)
    PACK: tl.constexpr = 32 // BITS
    share = tl.program_id(1)
    rows, columns = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_rows = rows < m
    x_rows = x + rows.to(tl.int64) * X_STRIDE
    stop = min((share + 1) * SHARE, K // PACK)
    acc = packed_product(
        x_rows,
        live_rows,
        words,
        scales,
        zeros,
        columns,
        share * SHARE,
        stop,
        K,
        N,
        GROUP,
        BITS,
        INTERLEAVE,
        BLOCK_M,
        BLOCK_N,
        WORDS,
    )
    live_columns = (columns < N) | (N % BLOCK_N == 0)
    at = out + (share * m + rows)[:, None].to(tl.int64) * OUT_STRIDE + columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=live_rows[:, None] & live_columns[None, :])


@triton.jit(do_not_specialize=["m"])
def _add_shares(
    shares,
    out,
    m,
    N: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    start_after_the_kernel_before(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for share in range(SHARES):
        total += tl.load(shares + (share * m + row) * N + columns, mask=columns < N, other=0.0)
    tl.store(out + row * OUT_STRIDE + columns, total.to(out.dtype.element_ty), mask=columns < N)


@triton.jit
def _dequantise(
    words,
    scales,
    zeros,
    out,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PACK: tl.constexpr = 32 // BITS
    word = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = columns < N
    packed = tl.load(words + word * N + columns, mask=live, other=0)
    first = word // INTERLEAVE * (INTERLEAVE * PACK) + word % INTERLEAVE
    for i in tl.static_range(PACK):
        row = first + i * INTERLEAVE
        if i == 0 or INTERLEAVE > 1:  # else the numbers of a word are of one group
            group = row // GROUP * N + columns
            scale = tl.load(scales + group, mask=live, other=0.0).to(tl.float32)
            zero = tl.full([BLOCK_N], 1 << (BITS - 1), tl.float32)
            if zeros is not None:
                zero = tl.load(zeros + group, mask=live, other=0.0).to(tl.float32)
        weight = (_unpacked(packed, i, BITS, tl.float32) - zero) * scale
        tl.store(out + row * N + columns, weight.to(out.dtype.element_ty), mask=live)


def dequantised(
    launch: Launch,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    interleave: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight [K, N], or those of all experts [E, K, N], that `qweight` is packed from."""
    *experts, words, columns = qweight.shape
    full = torch.empty((*experts, words * (32 // bits), columns), dtype=dtype, device=qweight.device)
    rows = qweight.numel() // columns  # no group of one expert reaches into the next
    shape = {"N": columns, "GROUP": group_size, "BITS": bits, "INTERLEAVE": interleave}
    launch(
        _dequantise,
        (rows, triton.cdiv(columns, _DEQUANTISE_BLOCK_N)),
        qweight,
        scales,
        zeros,
        full,
        BLOCK_N=_DEQUANTISE_BLOCK_N,
        **shape,
    )
    return full


def w4a16_gemm(
    launch: Launch,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    interleave: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Weights of 4 bits; the other operands but `x` and `out` are contiguous."""
    return _gemm(launch, 4, x, qweight, scales, zeros, group_size, interleave, workspace, out)


def w8a16_gemm(
    launch: Launch,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    group_size: int,
    interleave: int = 1,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Weights of 8 bits; the other operands but `x` and `out` are contiguous."""
    return _gemm(launch, 8, x, qweight, scales, zeros, group_size, interleave, workspace, out)


def _gemm(
    launch: Launch,
    bits: int,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    interleave: int,
    workspace: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    check_shapes(qweight, scales, zeros, bits, group_size, interleave)
    rows, inner = x.shape
    words, columns = qweight.shape
    if out is None:
        out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    tile = launch.tile(f"w{bits}a16_gemm", rows=rows, group_size=group_size, columns=columns)
    if rows > tile["max_rows"]:
        full = dequantised(launch, qweight, scales, zeros, bits, group_size, interleave, x.dtype)
        return torch.mm(x, full, out=out)
    shares = wna16_shares(tile, launch.capability, words, columns)
    target = out
    if shares > 1:
        size = shares * rows * columns
        if workspace is None:
            workspace = torch.empty(size, dtype=torch.float32, device=x.device)
        target = workspace[:size].view(shares * rows, columns)
    share = triton.cdiv(triton.cdiv(words, tile["words"]), shares) * tile["words"]
    launch(
        _gemm_packed,
        (triton.cdiv(columns, tile["block_n"]), shares),
        x,
        qweight,
        scales,
        zeros,
        target,
        rows,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        K=inner,
        N=columns,
        GROUP=group_size,
        BITS=bits,
        INTERLEAVE=interleave,
        X_STRIDE=x.stride(0),
        OUT_STRIDE=target.stride(0),
        SHARE=share,
        SHARES=shares,
        BLOCK_M=max(16, next_power_of_2(rows)),
        BLOCK_N=tile["block_n"],
        WORDS=tile["words"],
    )
    if shares > 1:
        sums = {"N": columns, "OUT_STRIDE": out.stride(0), "SHARES": shares, "BLOCK": 1024}
        launch(_add_shares, (rows, triton.cdiv(columns, 1024)), target, out, rows, **sums)
    return out
