"""Keys and values of 8 bits with a scale for each row: what is written, and attention over it, in both forms."""

import pytest
import torch

from int8_case import KV_HEADS, Q_HEADS, Int8Case
from scalellm.kernels.cpu.building import cpu_features

# C++ rounds queries and weights to 8 bits as well: what that comes to among numbers of magnitude 1. Weights have 7 bits
# on an x86 CPU without an instruction for products of bytes (kernels/cpu/dot.h).
HAS_7_BITS = "avx2" in cpu_features() and not {"avx512_vnni", "avx_vnni"} & cpu_features()
TOLERANCE = {"torch": 1e-5, "cpp": 0.1 if HAS_7_BITS else 0.05}


def check(ops, case, result, expected):
    tolerance = TOLERANCE["cpp" if case.is_cpp else "torch"]
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("page", "head_dim"), [(16, 64), (64, 32), (32, 96), (16, 256), (16, 48), (8, 64)])
@pytest.mark.parametrize("options", [{}, {"window": 30}, {"softcap": 3.0}, {"sinks": torch.linspace(-1, 2, Q_HEADS)}])
def test_prompts_against_the_definition(ops, page, head_dim, options):
    case = Int8Case(ops, [1, 15, 16, 17, 64, 70, 300], page=page, head_dim=head_dim)
    check(ops, case, case.prompt(ops, **options), case.expected(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 30}, {"window": 100, "softcap": 3.0}])
def test_decodes_against_the_definition(ops, options, dtype):
    case = Int8Case(ops, [1, 17, 64, 65, 600], dtype=dtype)
    last = case.starts[1:].long() - 1
    result = case.decode(ops, last, case.lens, case.table, **options)
    check(ops, case, result, case.expected(**options)[last])


@pytest.mark.parametrize("window", [0, 30, 100])
def test_a_row_of_a_prompt_is_that_of_its_decode(ops, window):
    """Weights are rounded tile by tile: each row must meet the same tiles, whatever is beside it."""
    if ops.library is None:
        pytest.skip("torch multiplies matrices of other shapes in another order")
    case = Int8Case(ops, [600])
    prompt = case.prompt(ops, window=window)
    for length in (1, 64, 65, 130, 256, 257, 400, 600):
        row = case.decode(ops, slice(length - 1, length), [length], case.table, window=window)
        assert torch.equal(row[0], prompt[length - 1])


def test_beginnings_in_common_give_what_each_row_gives_alone(ops):
    if ops.library is None:
        pytest.skip("torch computes no beginnings at once")
    case = Int8Case(ops, [600] + [20] * 40)
    table = torch.cat((case.table[:1, :32].expand(41, -1), case.table[:, :6]), dim=1)
    table[0] = case.table[0, : table.shape[1]]
    lens = [600] + [512 + 20] * 40
    rows = case.starts[1:].long() - 1
    together = case.decode(ops, rows, lens, table)
    for s in range(len(lens)):
        assert torch.equal(case.decode(ops, rows[s : s + 1], lens[s : s + 1], table[s : s + 1])[0], together[s])


def test_all_magnitudes_are_kept_within_a_half_code(ops):
    """Rows of zeros, tiny and huge ones; what is not finite is not made so."""
    case = Int8Case(ops, [8])
    scales = torch.tensor([0.0, 1e-38, 1e-20, 1e-6, 1.0, 1e6, 1e20, 1e34])
    values = torch.randn(8, KV_HEADS, 64) * scales.view(-1, 1, 1)
    qkv = torch.cat((torch.zeros(8, Q_HEADS + KV_HEADS, 64), values), dim=1)
    still = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), dim=1)
    zeros = torch.zeros(8, dtype=torch.int64)
    for infinite in (False, True):
        if infinite:
            qkv[:, -1, 0] = torch.inf
        ops.qk_norm_rope_and_cache(qkv.flatten(1), zeros, still, case.slots, case.k_cache, case.v_cache)
        for at, scale in enumerate(scales.tolist()):  # a window of one token shows its value
            out = case.decode(ops, slice(at, at + 1), [at + 1], case.table, window=1)[0].view(KV_HEADS, 3, 64)
            bound = max(values[at].abs().max().item() / 127, 1e-30)
            error = (out - values[at].unsqueeze(1)).abs()
            assert (error[: KV_HEADS - infinite] <= bound).all(), scale
            assert not (infinite and out[-1].isfinite().any())


def test_copied_blocks_hold_the_same(ops):
    case = Int8Case(ops, [40, 33])
    before = case.prompt(ops)
    spare = (
        set(range(case.k_cache.shape[0])) - set(case.table[0, :3].tolist()) - set(case.table[1, :3].tolist())
    ).pop()
    moved = int(case.table[0, 1])
    ops.copy_blocks_(case.k_cache, case.v_cache, torch.tensor([[moved, spare]]))
    case.k_cache[moved], case.v_cache[moved] = -1, -1
    case.table[0, 1] = spare
    assert torch.equal(case.prompt(ops), before)


def test_torch_refuses_bytes_that_it_cannot_read(ops):
    if ops.library is None:
        pytest.skip("there are none")
    case = Int8Case(ops, [5])
    with pytest.raises(ValueError, match="the cache lies in bytes for the C\\+\\+ forms"):
        ops.unified_attention(
            *(case.q.half(), case.k_cache, case.v_cache, case.starts, case.lens, case.table), max_seqlen_q=5, scale=1.0
        )
