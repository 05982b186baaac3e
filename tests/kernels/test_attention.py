import dataclasses

import pytest
import torch

from scalellm.kernels.spec.case import lay_keys
from scalellm.kernels.spec.paged import Options
from virtual_memory import virtual_tensor

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def paged_case(ops, paged_case):
    """Cases whose keys lie as the form of `ops` has them."""

    def make(*args, **kwargs):
        case = paged_case(*args, **kwargs)
        return dataclasses.replace(case, k_cache=lay_keys(ops, case.k_cache))

    return make


def run(ops, case, **options):
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


def check(result, expected, dtype=torch.float32):
    torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_window_far_smaller_than_a_long_prompt(ops, paged_case):
    # Whole key tiles of the product are masked for the late queries.
    case = paged_case([1300], [1300], q_heads=1, kv_heads=1, head_dim=64)
    check(run(ops, case, window=5), case.attention(0.125, Options(window=5)))


def precision_of(ops) -> torch.dtype:
    """Precision of products with keys and values of less than four bytes: C++ may multiply pairs of bfloat16."""
    return torch.float32 if ops.library is None else torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 7, 30])  # lengths and windows, so that keys begin and end at any place
def test_a_cache_of_half_precision(ops, paged_case, dtype, window):
    lens = [0, 1, 17, 33, 300, 298]
    case = paged_case(lens, [1, 1, 1, 20, 1, 31], dtype=dtype, q_heads=9, kv_heads=3)
    case = dataclasses.replace(case, q=case.q.float())
    check(run(ops, case, window=window), case.attention(0.125, Options(window=window)), precision_of(ops))
    decodes = paged_case(lens, [1] * len(lens), dtype=dtype, q_heads=9, kv_heads=3)
    decodes = dataclasses.replace(decodes, q=decodes.q.float())
    expected = decodes.attention(0.125, Options(window=window))
    check(decode(ops, decodes, window=window), expected, precision_of(ops))


def decode(ops, case, **options):
    out = torch.full_like(case.q, torch.nan)
    result = ops.paged_attention_decode(
        case.q,
        case.k_cache,
        case.v_cache,
        case.block_table,
        case.seq_lens,
        scale=0.125,
        num_splits=4,
        out=out,
        **options,
    )
    assert result is out
    return out


@pytest.mark.parametrize("window", [0, 1500])
def test_decode_of_long_rows(ops, paged_case, window):
    lens = [1024, 3000, 5, 1025, 2049]
    case = paged_case(lens, [1] * len(lens), q_heads=6, kv_heads=2, window=window)
    check(decode(ops, case, window=window), case.attention(0.125, Options(window=window)))


def test_a_block_that_the_cache_does_not_have_is_refused(ops, paged_case):
    case = paged_case([5, 20], [1, 1])
    for block in (-1, len(case.k_cache)):
        case.block_table[1, 1] = block
        with pytest.raises((IndexError, ValueError)):
            decode(ops, case)
        with pytest.raises((IndexError, ValueError)):
            run(ops, case)


@pytest.mark.parametrize("page", [1, 7, 48])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_page_and_number_of_threads(ops, paged_case, page, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        case = paged_case([300, 0, 13, 250], [1, 1, 13, 100], page=page)
        check(run(ops, case), case.attention(0.125))
        case = paged_case([300, 0, 13, 250], [1] * 4, page=page, q_heads=6)
        check(decode(ops, case), case.attention(0.125))
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_its_neighbours(ops, paged_case):
    lens = [200, 3, 17, 64, 65, 130] * 12  # several gather groups
    case = paged_case(lens, [1] * len(lens), q_heads=9, kv_heads=3)
    together = run(ops, case)
    for s in (0, 1, 40, 71):
        alone = ops.paged_attention_decode(
            case.q[s : s + 1],
            case.k_cache,
            case.v_cache,
            case.block_table[s : s + 1],
            case.seq_lens[s : s + 1],
            scale=0.125,
        )
        torch.testing.assert_close(alone[0], together[s], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("page", "dtype"), [(16, torch.float32), (64, torch.float32), (16, torch.float16)])
def test_beginnings_in_common(ops, paged_case, page, dtype):
    """Rows whose first blocks are the same ones are computed together, and come out as each does alone."""
    lens = [700, 40, 513, 700, 600, 256, 700, 530, 300, 257, 512, 700] + [520 + i for i in range(30)]
    case = paged_case(lens, [1] * len(lens), q_heads=9, kv_heads=3, page=page, dtype=dtype)
    case = dataclasses.replace(case, q=case.q.float())
    first = {0: lens, 4: lens[4:8], 20: lens[20:]}  # three families, of which one is larger than is computed at once
    leader = 0
    for s, length in enumerate(lens):
        leader = s if s in first else leader
        common = min(512, length, lens[leader]) // page * page
        case.block_table[s, : common // page] = case.block_table[leader, : common // page]
        case.k[s][:common], case.v[s][:common] = case.k[leader][:common], case.v[leader][:common]
    together = decode(ops, case)
    check(together, case.attention(0.125), precision_of(ops) if dtype != torch.float32 else dtype)
    rows = (case.block_table, case.seq_lens)
    for s in range(len(lens)):
        table, length = (tensor[s : s + 1] for tensor in rows)
        alone = ops.paged_attention_decode(case.q[s : s + 1], case.k_cache, case.v_cache, table, length, scale=0.125)
        if ops.library is None:
            torch.testing.assert_close(alone[0], together[s], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(alone[0], together[s])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 30, 100])
def test_a_row_of_a_prompt_is_that_of_its_decode(ops, paged_case, dtype, window):
    """All sums have one order, so that a preempted sequence that is computed again comes out the same."""
    if ops.library is None:
        pytest.skip("torch multiplies matrices of other shapes in another order")
    case = paged_case([600], [600], q_heads=9, kv_heads=3, dtype=dtype)
    case = dataclasses.replace(case, q=case.q.float())
    prompt = run(ops, case, window=window)
    for length in (1, 64, 65, 130, 256, 257, 400, 600):
        row = case.q[length - 1 : length]
        lens = torch.tensor([length], dtype=torch.int32)
        cache = (case.k_cache, case.v_cache, case.block_table)
        alone = ops.paged_attention_decode(row, *cache, lens, scale=0.125, window=window)
        assert torch.equal(alone[0], prompt[length - 1])


def test_chunks_add_up_to_the_whole_prompt(ops, paged_case):
    whole = paged_case([50], [50])
    expected = whole.attention(0.125)
    for begin, end in ((0, 20), (20, 21), (21, 50)):
        part = ops.unified_attention(
            whole.q[begin:end],
            whole.k_cache,
            whole.v_cache,
            torch.tensor([0, end - begin], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
            whole.block_table,
            max_seqlen_q=end - begin,
            scale=0.125,
        )
        check(part, expected[begin:end])


def test_rows_past_the_last_sequence_are_zero(ops, paged_case):
    case = paged_case([5], [1])
    q = torch.cat((case.q, torch.full_like(case.q, torch.nan)))
    out = ops.unified_attention(
        q, case.k_cache, case.v_cache, case.cu_seqlens_q, case.seq_lens, case.block_table, max_seqlen_q=1, scale=1.0
    )
    assert (out[1] == 0).all()
    assert out[0].isfinite().all()


def test_more_queries_than_tokens_is_refused(ops, paged_case):
    case = paged_case([3], [3])
    with pytest.raises(ValueError, match=r"seq_lens\[0\] is 2, less than its 3 query tokens"):
        ops.unified_attention(
            case.q,
            case.k_cache,
            case.v_cache,
            case.cu_seqlens_q,
            case.seq_lens - 1,
            case.block_table,
            max_seqlen_q=3,
            scale=1.0,
        )


def test_slots_past_two_to_the_31_elements(ops, paged_case):
    page, heads, dim = 64, 8, 128
    blocks = 34_000
    cache = virtual_tensor(blocks, page, heads, dim, dtype=torch.float16)
    assert cache.numel() > 2**31
    cache[-1] = torch.randn(page, heads, dim)
    q = torch.randn(1, heads, dim)
    out = ops.paged_attention_decode(
        q, cache, cache, torch.tensor([[blocks - 1]], dtype=torch.int32), torch.tensor([page]), scale=0.1
    )
    last = cache[-1].double()
    expected = torch.einsum(
        "thd,ht->hd", last, torch.softmax(torch.einsum("hd,thd->ht", q[0].double(), last) * 0.1, -1)
    )
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-5)
