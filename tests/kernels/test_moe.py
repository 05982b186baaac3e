import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from scalellm.kernels import moe_align_block_size


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    experts=st.integers(1, 6),
    k=st.integers(1, 3),
    tokens=st.integers(0, 20),
    block=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
def test_blocks_hold_each_pair_once_and_one_expert(experts, k, tokens, block, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (tokens, k), generator=g, dtype=torch.int32)
    pairs = tokens * k
    order, block_experts, used = moe_align_block_size(ids, block, experts)
    assert len(order) == pairs + experts * (block - 1)
    used = int(used)
    assert used % block == 0
    assert (order[used:] == pairs).all()
    assert (block_experts[used // block :] == -1).all()
    assert sorted(p for p in order.tolist() if p != pairs) == list(range(pairs))
    flat = ids.flatten().tolist()
    placed: dict[int, list[int]] = {}
    for i in range(used // block):
        members = [p for p in order[i * block : (i + 1) * block].tolist() if p != pairs]
        assert members, "a block of padding only"
        assert {flat[p] for p in members} == {int(block_experts[i])}
        placed.setdefault(int(block_experts[i]), []).extend(members)
    assert list(placed) == sorted(placed)
    assert all(members == sorted(members) for members in placed.values())


def test_fused_moe_as_transformers(ops):
    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    block = MixtralSparseMoeBlock(config)
    g = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.2
    x = randn(9, 32)
    with torch.no_grad():
        expected = block(x.unsqueeze(0))
        expected = (expected[0] if isinstance(expected, tuple) else expected).view(9, 32)
        weights, ids = ops.topk_softmax(x @ block.gate.weight.T, 2, True)
        out = torch.full_like(x, torch.nan)
        assert ops.fused_moe(x, block.experts.gate_up_proj, block.experts.down_proj, weights, ids, out=out) is out
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
