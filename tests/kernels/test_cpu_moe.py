"""Mixtures of experts in C++, against one token and one expert at a time."""

import pytest
import torch

from cpu_levels import library_rounds_inputs_to_bfloat16
from scalellm.kernels import Capability, Ops, select_ops, topk_softmax
from scalellm.kernels.cpu import moe
from scalellm.kernels.cpu.gemm_dense import DTYPES

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def ops_for(dtype: torch.dtype) -> Ops:
    chosen = select_ops(Capability(sm=0, num_sms=1), dtype=dtype)
    if chosen.backends["fused_moe_wna16"] != "cpp":
        pytest.skip("there is no compiler")
    return chosen


@pytest.fixture(scope="module")
def ops() -> Ops:
    return ops_for(torch.float32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(experts, inputs, columns, bits, group_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = experts, inputs * bits // 32, columns
    words = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int()
    scales = torch.randn(experts, inputs // group_size, columns, generator=generator).mul(0.2 / (1 << bits)).to(dtype)
    zeros = torch.rand(scales.shape, generator=generator).mul(1 << bits).to(dtype)
    return words, scales, zeros


def one_by_one(x, layer, weights, ids):
    """`layer(row, expert)` for each choice of each token, added up in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, choices in enumerate(ids.tolist()):
        for j, expert in enumerate(choices):
            out[t] += weights[t, j].double() * layer(x[t : t + 1], expert)[0].double()
    return out


def assert_close(got, expected, tolerance=None):
    assert ((got.double() - expected).norm() / expected.norm()).item() < (tolerance or TOLERANCE[got.dtype])


def assert_rows_are_their_own(layer, x, weights, ids, monkeypatch):
    """Alone, among others, on two threads and in several parts a row has the same bits."""
    together = layer(x, weights, ids)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 2, 7, x.shape[0]):
                assert torch.equal(layer(x[-rows:], weights[-rows:], ids[-rows:]), together[-rows:])
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(moe, "_MOST_BYTES", 4000)
    assert torch.equal(layer(x, weights, ids), together)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "k", "hidden", "inner"), [(150, 3, 2, 64, 48), (9, 8, 3, 40, 50)])
def test_dense_experts(ops, monkeypatch, weight_dtype, tokens, experts, k, hidden, inner):
    x = randn(tokens, hidden)
    w13 = (randn(experts, 2 * inner, hidden, seed=1) * 0.2).to(weight_dtype)
    w2 = (randn(experts, hidden, inner, seed=2) * 0.2).to(weight_dtype)
    weights, ids = ops.topk_softmax(randn(tokens, experts, seed=3), k, True)
    ids[ids == 1] = 2  # an expert without tokens, which is not read
    w13[1] = torch.nan

    def layer(row, expert):
        gate, up = (w13[expert].double() @ row[0].double()).chunk(2)
        return (w2[expert].double() @ (torch.nn.functional.silu(gate) * up)).unsqueeze(0)

    out = torch.full_like(x, torch.nan)
    assert ops.fused_moe(x, w13, w2, weights, ids, out=out) is out
    rounds = weight_dtype == torch.bfloat16 and library_rounds_inputs_to_bfloat16(ops.library)
    assert_close(out, one_by_one(x, layer, weights, ids), TOLERANCE[torch.bfloat16] if rounds else None)
    assert_rows_are_their_own(lambda *args: ops.fused_moe(args[0], w13, w2, *args[1:]), x, weights, ids, monkeypatch)


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_experts(dtype, monkeypatch, bits, has_zeros):
    """The product of one expert has a test of its own."""
    ops = ops_for(dtype)
    tokens, experts, k, hidden, inner, group = 150, 3, 2, 64, 96, 32
    x = randn(tokens, hidden).to(dtype)
    w13, s13, z13 = packed(experts, hidden, 2 * inner, bits, group, dtype, 1)
    w2, s2, z2 = packed(experts, inner, hidden, bits, group, dtype, 2)
    weights, ids = topk_softmax(randn(tokens, experts, seed=3), k, False)
    gemm = ops.w4a16_gemm if bits == 4 else ops.w8a16_gemm

    def layer(row, e):
        up = gemm(row, w13[e], s13[e], z13[e] if has_zeros else None, group_size=group)
        return gemm(ops.silu_and_mul(up), w2[e], s2[e], z2[e] if has_zeros else None, group_size=group)

    options = {"w13_scales": s13, "w2_scales": s2, "bits": bits, "group_size": group}
    if has_zeros:
        options |= {"w13_zeros": z13, "w2_zeros": z2}
    got = ops.fused_moe_wna16(x, w13, w2, weights, ids, **options)
    assert_close(got, one_by_one(x, layer, weights, ids))
    in_torch = Ops().fused_moe_wna16(x, w13, w2, weights, ids, **options)
    assert (got - in_torch).float().norm() / in_torch.float().norm() < 0.02
    assert_rows_are_their_own(
        lambda *args: ops.fused_moe_wna16(args[0], w13, w2, *args[1:], **options), x, weights, ids, monkeypatch
    )


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (1, 1), (60, 4), (128, 8), (3, 3)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_choice(ops, experts, k, renormalize):
    logits = randn(300, experts) * 3
    logits[1] = 0.0
    logits[2, experts // 2 :] = logits[2, 0]
    logits[3] = -torch.inf
    logits[4, -1] = torch.nan
    logits[5, 0] = torch.inf
    weights, ids = ops.topk_softmax(logits, k, renormalize)
    expected, expected_ids = topk_softmax(logits, k, renormalize)
    torch.testing.assert_close(weights, expected, atol=1e-7, rtol=2e-6, equal_nan=True)
    assert weights[3:6].isnan().all()
    finite = logits.isfinite().all(1)
    assert torch.equal(ids[finite], expected_ids[finite])
    for chosen in ids.tolist():
        assert len(set(chosen) & set(range(experts))) == k
    assert torch.equal(ops.topk_softmax(logits[7:8], k, renormalize)[0], weights[7:8])
    assert ops.topk_softmax(logits[:0], k, renormalize)[1].shape == (0, k)


def test_experts_that_are_not_there_are_refused(ops):
    x, w13, w2 = randn(2, 8), randn(3, 8, 8), randn(3, 8, 4)
    for wrong in (-1, 3):
        ids = torch.tensor([[0, 1], [2, wrong]], dtype=torch.int32)
        with pytest.raises(ValueError, match=rf"ids\[1\] is \[2, {wrong}\], there are 3 experts"):
            ops.fused_moe(x, w13, w2, torch.ones(2, 2), ids)


def test_no_tokens(ops):
    none = torch.empty(0, 2)
    assert ops.fused_moe(randn(0, 8), randn(3, 8, 8), randn(3, 8, 4), none, none.int()).shape == (0, 8)
