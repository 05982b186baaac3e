import pytest
import torch

from scalellm.kernels import (
    fused_moe,
    fused_moe_wna16,
    moe_align_block_size,
    topk_softmax,
    workspaces,
)
from scalellm.kernels.spec.gemm_wna16 import pack, unpacked
from scalellm.kernels.triton import moe, moe_wna16
from virtual_memory import virtual_tensor

E4M3 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(tokens, experts, k, seed=9):
    return topk_softmax(randn(tokens, experts, seed=seed) * 2, k, True)


def exact(x, w13, w2, weights, ids):
    """Compute one token and one expert at a time in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, choices in enumerate(ids.tolist()):
        for j, e in enumerate(choices):
            gate, up = (w13[e].double() @ x[t].double()).chunk(2)
            out[t] += weights[t, j].double() * (w2[e].double() @ (torch.nn.functional.silu(gate) * up))
    return out


def assert_close(got, expected):
    error = (got.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[got.dtype], float(error)


def test_narrow_scale_blocks_are_refused(ops):
    w13, w2 = randn(3, 96, 64).to(E4M3), randn(3, 64, 48, seed=1).to(E4M3)
    weights, ids = routed(4, 3, 2)
    with pytest.raises(ValueError, match="w13_scale: blocks of 8 columns; the width must be a multiple of 16"):
        ops.fused_moe(randn(4, 64).bfloat16(), w13, w2, weights, ids, w13_scale=torch.ones(3, 1, 8), w2_scale=None)


def test_many_tokens(ops, monkeypatch):
    monkeypatch.setattr(moe, "MANY_ROWS", 8)
    x = randn(20, 32).bfloat16()
    w13, w2 = (randn(3, 96, 32, seed=1) * 0.2).bfloat16(), (randn(3, 32, 48, seed=2) * 0.2).bfloat16()
    weights, ids = routed(20, 3, 2)
    ids[ids == 1] = 2  # an expert without tokens
    assert_close(ops.fused_moe(x, w13, w2, weights, ids), exact(x, w13, w2, weights, ids))


def test_experts_without_tokens_are_not_read(ops):
    x, w13, w2 = randn(4, 32), randn(3, 96, 32, seed=1), randn(3, 32, 48, seed=2)
    weights, ids = routed(4, 3, 1)
    ids[ids == 1] = 2
    expected = ops.fused_moe(x, w13, w2, weights, ids)
    w13[1], w2[1] = torch.nan, torch.nan
    assert torch.equal(ops.fused_moe(x, w13, w2, weights, ids), expected)


def test_routing_goes_into_out(ops):
    wide = torch.full((5, 40), torch.nan)
    logits = wide[:, 8:16].copy_(randn(5, 8))
    out = torch.full((5, 2), torch.nan), torch.full((5, 2), -7, dtype=torch.int32)
    got = ops.topk_softmax(logits, 2, True, out=out)
    expected = topk_softmax(logits, 2, True)
    assert all(tensor is other for tensor, other in zip(got, out, strict=True))
    torch.testing.assert_close(out[0], expected[0], atol=1e-7, rtol=2e-6)
    assert torch.equal(out[1], expected[1])
    layout = moe_align_block_size(out[1], 16, 8)
    poisoned = tuple(torch.full_like(part, -7) for part in layout)
    scratch = torch.full((workspaces.moe_layout_sizes(10, 16, 8)[2],), -7, dtype=torch.int32)
    ops.moe_align_block_size(out[1], 16, 8, workspace=scratch, out=poisoned)
    for tensor, other in zip(poisoned, layout, strict=True):
        assert torch.equal(tensor, other)


def packed_experts(experts, inner, columns, bits, group_size, dtype, with_zeros, seed, interleave=1):
    """Return packed weights, scales and zero points of all experts, and the weights in float64, [E, N, K]."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (experts, inner, columns), generator=g)
    words = pack(q, bits, interleave)
    scales = ((torch.rand(experts, inner // group_size, columns, generator=g) + 0.5) / (4 << bits)).to(dtype)
    zeros = (torch.rand(scales.shape, generator=g) * (1 << bits)).to(dtype) if with_zeros else None
    return words, scales, zeros, unpacked(q, scales, zeros, bits).transpose(1, 2)


def packed_layer(bits, group_size, dtype, with_zeros, tokens, experts=3, k=2, hidden=64, inner=96, interleave=1):
    """Return arguments of the op, and what comes out of them in float64."""
    form = bits, group_size, dtype, with_zeros
    w13, s13, z13, full13 = packed_experts(experts, hidden, 2 * inner, *form, 1, interleave)
    w2, s2, z2, full2 = packed_experts(experts, inner, hidden, *form, 2, interleave)
    x = randn(tokens, hidden).to(dtype)
    weights, ids = routed(tokens, experts, k)
    ids[ids == 1] = 0  # an expert without tokens
    options = {"w13_scales": s13, "w2_scales": s2, "w13_zeros": z13, "w2_zeros": z2}
    options |= {"bits": bits, "group_size": group_size, "interleave": interleave}
    return (x, w13, w2, weights, ids), options, exact(x, full13, full2, weights, ids)


@pytest.mark.parametrize("with_zeros", [False, True])
def test_many_tokens_unpack_the_experts(ops, monkeypatch, with_zeros):
    monkeypatch.setattr(moe_wna16, "MANY_ROWS", 8)
    for interleave in (1, 4):
        args, options, expected = packed_layer(4, 32, torch.bfloat16, with_zeros, tokens=20, interleave=interleave)
        assert_close(ops.fused_moe_wna16(*args, **options), expected)


def test_packed_experts_of_more_than_2_31_elements(launch):
    experts = 9_000_000  # only the last has memory
    last, scale, _, full = packed_experts(1, 32, 64, 4, 32, torch.bfloat16, False, 3)
    words = virtual_tensor(experts, 4, 64, dtype=torch.int32)
    scales = virtual_tensor(experts, 1, 64, dtype=torch.bfloat16)
    assert words.numel() > 2**31
    words[-1], scales[-1] = last[0], scale[0]
    x, out = randn(1, 32, seed=1).bfloat16(), torch.empty(1, 64, dtype=torch.bfloat16)
    layout = torch.tensor([0] + [1] * 15).int(), torch.tensor([experts - 1]).int(), torch.tensor([16]).int()
    tile = launch.tile("fused_moe_wna16", rows_per_expert=0, bits=4, group_size=32)
    moe_wna16._grouped(launch, x, (words, scales, None), layout, out, tile, 4, 32, 1)
    assert_close(out, x.double() @ full[0].T)


def test_packed_operands_that_do_not_belong_together_are_refused(ops):
    args, options, _ = packed_layer(4, 32, torch.bfloat16, True, tokens=2)
    for op in (ops.fused_moe_wna16, fused_moe_wna16):
        with pytest.raises(ValueError, match="bits: 3 is neither 4 nor 8"):
            op(*args, **options | {"bits": 3})
        with pytest.raises(ValueError, match=r"w2_zeros: shape \(3, 3, 63\), not \(3, 3, 64\) for group_size 32"):
            op(*args, **options | {"w2_zeros": options["w2_zeros"][..., 1:]})
        with pytest.raises(ValueError, match="w13_scales: shape"):
            op(*args, **options | {"group_size": 16})
        with pytest.raises(ValueError, match="interleave: 16 does not divide the 8 words of a column"):
            op(*args, **options | {"interleave": 16})


def test_a_token_does_not_depend_on_the_others(ops):
    x = randn(6, 64).bfloat16()
    w13, w2 = randn(4, 96, 64, seed=1).bfloat16(), randn(4, 64, 48, seed=2).bfloat16()
    weights, ids = routed(6, 4, 2)
    together = ops.fused_moe(x, w13, w2, weights, ids)
    assert torch.equal(ops.fused_moe(x[4:5], w13, w2, weights[4:5], ids[4:5]), together[4:5])


def test_weights_of_more_than_2_31_elements(launch):
    experts = 9_000_000  # only the last has memory
    weight = virtual_tensor(experts, 16, 16, dtype=torch.bfloat16)
    weight[-1] = randn(16, 16).bfloat16()
    x, out = randn(1, 16, seed=1).bfloat16(), torch.empty(1, 16)
    layout = torch.tensor([0] + [1] * 15).int(), torch.tensor([experts - 1]).int(), torch.tensor([16]).int()
    tile = launch.tile("fused_moe", rows_per_expert=0, element_size=2)
    moe._grouped(launch, x, weight, None, layout, out, tile, "weight")
    assert_close(out, x.double() @ weight[-1].double().T)


def test_columns_behind_the_result_are_not_written(ops):
    args, options, expected = packed_layer(4, 32, torch.bfloat16, False, tokens=4)
    wide = torch.full((4, 70), torch.nan, dtype=torch.bfloat16)
    assert_close(ops.fused_moe_wna16(*args, **options, out=wide[:, :64]), expected)
    assert wide[:, 64:].isnan().all()
    x, weights, ids = randn(5, 40), *routed(5, 3, 2)
    w13, w2 = randn(3, 260, 40, seed=1) * 0.2, randn(3, 40, 130, seed=2) * 0.2
    wide = torch.full((5, 48), torch.nan)
    assert_close(ops.fused_moe(x, w13, w2, weights, ids, out=wide[:, :40]), exact(x, w13, w2, weights, ids))
    assert wide[:, 40:].isnan().all()


def test_an_empty_batch(ops):
    weights, ids = torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32)
    assert ops.fused_moe(torch.zeros(0, 8), randn(3, 12, 8), randn(3, 8, 6), weights, ids).shape == (0, 8)
    args, options, _ = packed_layer(4, 32, torch.bfloat16, True, tokens=0)
    assert ops.fused_moe_wna16(*args, **options).shape == (0, 64)
    assert fused_moe(torch.zeros(0, 8), randn(3, 12, 8), randn(3, 8, 6), weights, ids).shape == (0, 8)
