"""Triton attention against the definition in float64. Every slot that must not be read holds NaN, as does `out`."""

from dataclasses import replace

import pytest
import torch

from scalellm.kernels import decode_workspace
from scalellm.kernels.spec.paged import Options
from scalellm.kernels.splits import decode_programs, decode_tickets, least_tiles
from virtual_memory import virtual_tensor

E4M3 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def unified(ops, case, **options):
    out = torch.full_like(case.q, torch.nan)
    options.setdefault("scale", case.q.shape[-1] ** -0.5)
    result = ops.unified_attention(
        case.q,
        case.k_cache,
        case.v_cache,
        case.cu_seqlens_q,
        case.seq_lens,
        case.block_table,
        max_seqlen_q=case.max_seqlen_q,
        out=out,
        **options,
    )
    assert result is out
    return out


def poisoned_workspace(case, num_splits):
    workspace = decode_workspace(*case.q.shape, num_splits)
    workspace[: -decode_tickets(workspace, *case.q.shape[:2]).numel()] = torch.nan
    return workspace


def decode(ops, case, num_splits, workspace=None, **options):
    out = torch.full_like(case.q, torch.nan)
    workspace = poisoned_workspace(case, num_splits) if workspace is None else workspace
    tickets = decode_tickets(workspace, *case.q.shape[:2])
    options.setdefault("scale", case.q.shape[-1] ** -0.5)
    result = ops.paged_attention_decode(
        case.q,
        case.k_cache,
        case.v_cache,
        case.block_table,
        case.seq_lens,
        num_splits=num_splits,
        workspace=workspace,
        out=out,
        **options,
    )
    assert result is out
    assert not tickets.any()
    return out


def check(result, expected, dtype=torch.float32):
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def e4m3(case):
    """The case with its cache quantised, and the dense K and V that the cache now stands for."""
    return replace(
        case,
        k_cache=case.k_cache.to(E4M3),
        v_cache=case.v_cache.to(E4M3),
        k=[k.to(E4M3).double() for k in case.k],
        v=[v.to(E4M3).double() for v in case.v],
    )


def test_a_lone_long_row_has_its_own_shares_in_a_full_batch(ops, launch, paged_case):
    """A long row is divided as if it were alone, among as many programs, and comes out the same to the last bit."""
    splits, lens = 8, [20, 0, 900, *[9] * 60, 130]
    case = paged_case(lens, [1] * len(lens), q_heads=2, kv_heads=1, page=64, dtype=torch.bfloat16)
    workspace = poisoned_workspace(case, splits)
    together = decode(ops, case, splits, workspace)
    check(together, case.attention(0.125), torch.bfloat16)
    begin = len(lens) * 2 * splits * 64
    weights = workspace[begin : begin + len(lens) * 2 * splits].view(len(lens), 2, splits)
    assert least_tiles(launch.capability, 64) == 2
    # Of 15 tiles each share has 2 and one more; of 130 keys, which are 3 tiles, there is one of 2 and one of 1.
    assert (~weights.isnan()).sum(-1).tolist() == [[n, n] for n in (0, 0, 5, *[0] * 60, 2)]
    assert decode_programs(launch.capability, len(lens), splits) > 5
    for row in (2, len(lens) - 1):
        alone = replace(
            case,
            q=case.q[row : row + 1],
            block_table=case.block_table[row : row + 1],
            seq_lens=case.seq_lens[row : row + 1],
        )
        assert torch.equal(decode(ops, alone, splits), together[row : row + 1])


def test_a_program_takes_several_shares_of_more_rows_than_it_looks_at_together(ops, launch, paged_case):
    lens = [300 if row % 40 == 0 else row % 3 for row in range(140)]
    case = paged_case(lens, [1] * len(lens), q_heads=1, kv_heads=1, page=64, dtype=torch.bfloat16)
    check(decode(ops, case, 8), case.attention(0.125), torch.bfloat16)
    few = paged_case([900] * 6, [1] * 6, q_heads=1, kv_heads=1, page=64, dtype=torch.bfloat16, window=700)
    assert decode_programs(launch.capability, 6, 16) < 6 * 6
    check(decode(ops, few, 16, window=700), few.attention(0.125, Options(window=700)), torch.bfloat16)


def test_queries_beyond_float16_with_an_e4m3_cache_stay_finite_and_others_stay_seen(ops, paged_case):
    case = e4m3(paged_case([17, 33], [1, 1], dtype=torch.bfloat16))
    case.q[0] *= 1e5
    expected = case.attention(0.125)
    for result in (decode(ops, case, 2), unified(ops, case)):
        check(result, expected, torch.bfloat16)
    case.q[1, 0, 0] = torch.nan
    for result in (decode(ops, case, 2), unified(ops, case)):
        assert result[1, 0].isnan().all()
        assert result[0].isfinite().all()


def test_a_row_does_not_depend_on_its_neighbours_or_its_place(ops, paged_case):
    case = paged_case([300, 3, 170], [1, 1, 1], q_heads=3, kv_heads=1)
    together = decode(ops, case, 4)
    order = torch.tensor([2, 0, 1])
    moved = replace(
        case, q=case.q[order], block_table=case.block_table[order].contiguous(), seq_lens=case.seq_lens[order]
    )
    assert torch.equal(decode(ops, moved, 4), together[order])


def test_one_workspace_serves_batches_of_any_size(ops, paged_case):
    """Captured graphs of several sizes use one workspace, one after the other."""
    workspace = decode_workspace(20, 2, 64, 1)
    few, many = (
        paged_case(lens, [1] * len(lens), q_heads=2, kv_heads=1, page=64, dtype=torch.bfloat16)
        for lens in ([330, 500], [70, 3, 330, 0, 190])
    )

    def run(case, num_splits):
        tables = case.block_table, case.seq_lens
        rows = {"scale": 0.125, "num_splits": num_splits, "workspace": workspace}
        return ops.paged_attention_decode(case.q, case.k_cache, case.v_cache, *tables, **rows)

    assert torch.equal(run(few, 8), decode(ops, few, 8))
    for _ in range(2):
        assert torch.equal(run(many, 4), decode(ops, many, 4))
        assert torch.equal(run(few, 8), decode(ops, few, 8))


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(6, 2), (5, 1), (7, 1)])
def test_rows_left_over_by_the_group_write_nothing(ops, paged_case, last_program_first, q_heads, kv_heads):
    case = paged_case([40, 20], [40, 1], q_heads=q_heads, kv_heads=kv_heads)
    rows = paged_case([40, 20], [1, 1], q_heads=q_heads, kv_heads=kv_heads)
    before, before_rows = unified(ops, case), decode(ops, rows, 2)
    last_program_first()
    assert torch.equal(unified(ops, case), before)
    assert torch.equal(decode(ops, rows, 2), before_rows)


def test_padding_changes_nothing_and_is_zero(ops, paged_case):
    case = paged_case([5, 40], [1, 7])
    alone = unified(ops, case)
    padded = replace(
        case,
        q=torch.cat((case.q, torch.full_like(case.q, torch.nan))),
        cu_seqlens_q=torch.cat((case.cu_seqlens_q, case.cu_seqlens_q[-1:].repeat(3))),
        seq_lens=torch.cat((case.seq_lens, torch.zeros(3, dtype=torch.int32))),
        block_table=torch.cat((case.block_table, torch.zeros_like(case.block_table), case.block_table[:1])),
    )
    result = unified(ops, padded)
    assert torch.equal(result[:8], alone)
    assert (result[8:] == 0).all()


def test_more_queries_than_tokens_are_zero(ops, paged_case):
    case = paged_case([3], [3])
    result = unified(ops, replace(case, seq_lens=case.seq_lens - 1))
    assert (result[0] == 0).all()
    assert result[1:].isfinite().all()


def test_an_empty_batch(ops, paged_case):
    case = paged_case([5], [0])
    assert unified(ops, case).shape == (0, 4, 64)
    none = paged_case([], [])
    assert decode(ops, none, 2).shape == (0, 4, 64)


def test_rows_of_a_packed_tensor(ops, paged_case):
    case = paged_case([17, 40], [1, 1])
    packed = torch.cat((case.q, torch.full_like(case.q, torch.nan)), dim=1)
    strided = replace(case, q=packed[:, :4])
    for run in (unified, lambda *args: decode(*args, 2)):
        assert torch.equal(run(ops, strided), run(ops, case))


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, E4M3])
def test_slots_past_two_to_the_31_elements(ops, dtype, page):
    blocks = 16_800_000 // page
    cache = virtual_tensor(blocks, page, 1, 128, dtype=dtype)
    assert cache.numel() > 2**31
    cache[-1] = torch.randn(page, 1, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(1)).half()
    table, lens = torch.tensor([[blocks - 1]], dtype=torch.int32), torch.tensor([page], dtype=torch.int32)
    last = cache[-1, :, 0].double()
    expected = torch.softmax(last @ q[0, 0].double() * 0.1, 0) @ last
    out = ops.paged_attention_decode(q, cache, cache, table, lens, scale=0.1, num_splits=2)
    check(out[0, 0], expected, torch.float16)
    cu = torch.tensor([0, 1], dtype=torch.int32)
    out = ops.unified_attention(q, cache, cache, cu, lens, table, max_seqlen_q=1, scale=0.1)
    check(out[0, 0], expected, torch.float16)


def test_refusals(ops, paged_case):
    case = paged_case([5], [1])
    with pytest.raises(ValueError, match="workspace: has 10 elements, 528 are needed"):
        ops.paged_attention_decode(
            case.q,
            case.k_cache,
            case.v_cache,
            case.block_table,
            case.seq_lens,
            scale=1.0,
            num_splits=2,
            workspace=torch.empty(10),
        )
    with pytest.raises(ValueError, match="must be contiguous"):
        unified(ops, replace(case, k_cache=case.k_cache[..., ::2]))
