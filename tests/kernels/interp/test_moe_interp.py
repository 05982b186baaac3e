import pytest
import torch

from kernels import fused_moe, fused_moe_workspace_size, moe_align_block_size, topk_softmax, workspaces
from kernels.triton import moe

E4M3 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(tokens, experts, k, seed=9):
    return topk_softmax(randn(tokens, experts, seed=seed) * 2, k, True)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (1, 1), (60, 4), (128, 8)])
def test_topk_softmax(ops, renormalize, experts, k):
    logits = randn(4, experts) * 3
    logits[1] = 0.0
    logits[2, experts // 2 :] = logits[2, 0]
    weights, ids = ops.topk_softmax(logits, k, renormalize)
    expected, expected_ids = topk_softmax(logits, k, renormalize)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, atol=1e-7, rtol=2e-6)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(0, 3, 2), (1, 8, 2), (5, 1, 1), (20, 6, 3), (33, 128, 4), (70, 256, 1)]
)
def test_layout_by_expert(ops, monkeypatch, tokens, experts, k, block_size):
    monkeypatch.setattr(workspaces, "MOE_ONE_HOT", 4096)  # several chunks even of few pairs
    ids = torch.randint(0, experts, (tokens, k), generator=torch.Generator().manual_seed(tokens), dtype=torch.int32)
    got, expected = ops.moe_align_block_size(ids, block_size, experts), moe_align_block_size(ids, block_size, experts)
    for tensor, other in zip(got, expected, strict=True):
        assert torch.equal(tensor, other)


def test_layout_when_all_tokens_go_to_one_expert(ops):
    ids = torch.full((40, 1), 5, dtype=torch.int32)
    for tensor, other in zip(ops.moe_align_block_size(ids, 16, 8), moe_align_block_size(ids, 16, 8), strict=True):
        assert torch.equal(tensor, other)


def exact(x, w13, w2, weights, ids, w13_scale=None, w2_scale=None):
    """Compute one token and one expert at a time in float64."""

    def full(weight, scale, e):
        if scale is None:
            return weight[e].double()
        rows, columns = (n // m for n, m in zip(weight.shape[1:], scale.shape[1:], strict=True))
        return weight[e].double() * torch.kron(scale[e].double(), torch.ones(rows, columns))

    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, choices in enumerate(ids.tolist()):
        for j, e in enumerate(choices):
            gate, up = (full(w13, w13_scale, e) @ x[t].double()).chunk(2)
            out[t] += weights[t, j].double() * (full(w2, w2_scale, e) @ (torch.nn.functional.silu(gate) * up))
    return out


def assert_close(got, expected):
    error = (got.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[got.dtype], float(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "experts", "k", "hidden", "inner"), [(1, 4, 2, 64, 48), (5, 3, 2, 40, 130)])
def test_expert_layer(ops, dtype, tokens, experts, k, hidden, inner):
    x = randn(tokens, hidden).to(dtype)
    w13 = (randn(experts, 2 * inner, hidden, seed=1) * 0.2).to(dtype)
    w2 = (randn(experts, hidden, inner, seed=2) * 0.2).to(dtype)
    weights, ids = routed(tokens, experts, k)
    wide = torch.full((tokens, hidden + 8), torch.nan, dtype=dtype)
    out = wide[:, :hidden]
    workspace = torch.full((fused_moe_workspace_size(tokens, k, experts, 2 * inner, hidden),), -1).int()
    assert ops.fused_moe(x, w13, w2, weights, ids, workspace=workspace, out=out) is out
    assert_close(out, exact(x, w13, w2, weights, ids))
    assert wide[:, hidden:].isnan().all()


@pytest.mark.parametrize(("shape13", "shape2"), [((1, 1), (1, 1)), ((96, 1), (64, 1)), ((3, 4), (2, 3))])
def test_expert_layer_with_e4m3_weights(ops, shape13, shape2):
    w13, w2 = randn(3, 96, 64).to(E4M3), randn(3, 64, 48, seed=1).to(E4M3)
    s13, s2 = randn(3, *shape13, seed=2).abs() * 0.2, randn(3, *shape2, seed=3).abs() * 0.2
    x = randn(4, 64, seed=4).bfloat16()
    weights, ids = routed(4, 3, 2)
    got = ops.fused_moe(x, w13, w2, weights, ids, w13_scale=s13, w2_scale=s2)
    assert_close(got, exact(x, w13, w2, weights, ids, s13, s2))


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


def test_blocks_of_many_rows(ops, launch):
    assert launch.tile("fused_moe", rows_per_expert=66, element_size=2)["block_m"] == 64
    x = randn(100, 32).half()
    w13, w2 = (randn(3, 96, 32, seed=1) * 0.2).half(), (randn(3, 32, 48, seed=2) * 0.2).half()
    weights, ids = routed(100, 3, 2)
    assert_close(ops.fused_moe(x, w13, w2, weights, ids), exact(x, w13, w2, weights, ids))


def test_a_token_does_not_depend_on_the_others(ops):
    x = randn(6, 64).bfloat16()
    w13, w2 = randn(4, 96, 64, seed=1).bfloat16(), randn(4, 64, 48, seed=2).bfloat16()
    weights, ids = routed(6, 4, 2)
    together = ops.fused_moe(x, w13, w2, weights, ids)
    assert torch.equal(ops.fused_moe(x[4:5], w13, w2, weights[4:5], ids[4:5]), together[4:5])


def test_weights_of_more_than_2_31_elements(launch):
    experts = 9_000_000  # only the last has memory
    weight = torch.empty(experts, 16, 16, dtype=torch.bfloat16)
    weight[-1] = randn(16, 16).bfloat16()
    x, out = randn(1, 16, seed=1).bfloat16(), torch.empty(1, 16)
    layout = torch.tensor([0] + [1] * 15).int(), torch.tensor([experts - 1]).int(), torch.tensor([16]).int()
    tile = launch.tile("fused_moe", rows_per_expert=0, element_size=2)
    moe._grouped(launch, x, weight, None, layout, out, tile, "weight")
    assert_close(out, x.double() @ weight[-1].double().T)


def test_an_empty_batch(ops):
    weights, ids = torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int32)
    assert ops.fused_moe(torch.zeros(0, 8), randn(3, 12, 8), randn(3, 8, 6), weights, ids).shape == (0, 8)
    assert fused_moe(torch.zeros(0, 8), randn(3, 12, 8), randn(3, 8, 6), weights, ids).shape == (0, 8)
