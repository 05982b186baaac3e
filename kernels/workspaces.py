"""Sizes of the scratch of device kernels, computed without Triton. An engine allocates it once, before it captures.

The constants that determine the layouts of scratch are defined here as well, and used by the kernels.
"""

from scalellm.kernels.capability import Capability
from scalellm.kernels.tiles import Tile, tile_table

SAMPLE_TILE = 1024  # logits of a row that one program has
SAMPLE_CANDIDATES = 8192  # logits of a row that its buffer holds
SAMPLE_PIVOTS = 16
MOE_ONE_HOT = 8192  # elements of (pair, expert) that one program holds
WNA16_INTERLEAVE = 16  # words of a weight that the Triton forms of w4a16_gemm, w8a16_gemm and fused_moe_wna16 read best
# Of a weight that kernels fetch ahead, see `kernels.triton.overlap`: what an H200's memory delivers in 3 us, which is
# what a small kernel and the gap behind it take. Its second-level cache is four times as large.
BYTES_AHEAD = 12 << 20
ROWS_AHEAD = 17, 256  # that a weight is multiplied with, for which the kernel before a product of torch's fetches it
_MOE_BLOCKS = (16, 32, 64, 128)  # rows of an expert's block that tile tables may choose


def sample_workspace_size(rows: int, vocab: int, num_logprobs: int = 0) -> int:
    """Return the length of the i64 workspace of `sample` for up to `rows` rows."""
    tiles = ceil_div(vocab, SAMPLE_TILE)
    return rows * sum(sample_row_sizes(tiles)) + rows * tiles * num_logprobs


def sample_row_sizes(tiles: int) -> tuple[int, int, int]:
    """Return the sizes of a row's longs, floats and ints in the workspace, in units of 8 bytes."""
    floats = 5 * tiles + SAMPLE_CANDIDATES + 3 + SAMPLE_PIVOTS
    return 2 * SAMPLE_PIVOTS * tiles + 3, (floats + 1) // 2, tiles + 1


def fused_moe_workspace_size(tokens: int, choices: int, experts: int, width: int, hidden: int) -> int:
    """Return the length of the i32 workspace of `fused_moe` and `fused_moe_wna16` for up to `tokens` tokens.

    `choices` is the number of experts of a token, `width` the rows of an expert's w13, gate and up together.
    """
    return max(sum(fused_moe_parts(tokens, choices, experts, width, hidden, block)) for block in _MOE_BLOCKS)


def fused_moe_parts(tokens: int, choices: int, experts: int, width: int, hidden: int, block_m: int) -> tuple[int, ...]:
    """Return the lengths of the layout's three results and counts, both hidden rows and the outputs, padded to 16
    bytes.
    """
    pairs = tokens * choices
    size, blocks, counts = moe_layout_sizes(pairs, block_m, experts)
    return tuple(
        ceil_div(n, 4) * 4 for n in (size, blocks, 1, counts, pairs * width, pairs * width // 2, pairs * hidden)
    )


def moe_layout_sizes(pairs: int, block_size: int, num_experts: int) -> tuple[int, int, int]:
    """Return the lengths of `sorted_token_ids`, of `expert_ids`, and of the counts from which the layout is made."""
    size = pairs + num_experts * (block_size - 1)
    chunk, block = moe_chunk(num_experts)
    return size, ceil_div(size, block_size), max(1, ceil_div(pairs, chunk)) * block


def moe_chunk(num_experts: int) -> tuple[int, int]:
    """Return the number of pairs and of experts, a power of two each, that one program counts."""
    block = 1 << (num_experts - 1).bit_length()
    return max(1, min(512, MOE_ONE_HOT // block)), block


def gemm_wna16_workspace_size(
    capability: Capability, bits: int, rows: int, inner: int, columns: int, group_size: int
) -> int:
    """Return the length of the f32 workspace of `w4a16_gemm` (bits 4) and `w8a16_gemm` (8) for up to `rows` rows.

    `inner` and `columns` are the K and N of the weight. The length is 0 if its columns alone fill the device.
    """
    table = tile_table(f"w{bits}a16_gemm", capability)
    size = 0
    for some in range(1, rows + 1):
        tile = table.choose(rows=some, group_size=group_size, columns=columns)
        if some > tile["max_rows"]:
            break
        shares = wna16_shares(tile, capability, inner * bits // 32, columns)
        size = max(size, shares * some * columns if shares > 1 else 0)
    return size


def wna16_shares(tile: Tile, capability: Capability, words: int, columns: int) -> int:
    """Return the number of parts into which the inner dimension is divided, equal for all numbers of rows of a rule."""
    wanted = tile["programs_per_sm"] * capability.num_sms // ceil_div(columns, tile["block_n"])
    return max(1, min(wanted, tile["max_shares"], words // (4 * tile["words"])))


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
