"""The torch forms run where their arguments are: none makes a tensor on a device of its own choice.

Here the arguments are on the CPU and the default device is another, so that a tensor made without saying where is not
beside them.
"""

import pytest
import torch

from scalellm import kernels
from scalellm.kernels import RowNorm, select_ops
from scalellm.kernels.dispatch import OP_NAMES

E4M3 = torch.float8_e4m3fn


@pytest.fixture
def case(paged_case):
    return paged_case([0, 1, 17, 33, 20, 40], [1, 1, 1, 33, 5, 1], q_heads=6, kv_heads=2)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls(case):
    """Return for each op the arguments of calls, made anew each time as some are written to."""
    attention = (case.q, case.k_cache, case.v_cache)
    lens = (case.cu_seqlens_q, case.seq_lens, case.block_table)
    rows = torch.arange(6)
    tokens = case.cu_seqlens_q[rows].long()
    x, cache, zero = randn(4, 64), randn(6, 16, 2, 16), torch.zeros(4, dtype=torch.int64)
    codes, scale = kernels.scaled_fp8_quant(x)
    words, scales = torch.arange(64, dtype=torch.int32).view(8, 8) * 12345, torch.ones(2, 8)
    w13, w2 = (torch.arange(16 * n, dtype=torch.int32).view(2, 8, n) * 12345 for n in (128, 64))
    weights, ids = kernels.topk_softmax(randn(4, 2), 1, True)
    entries = (torch.tensor([0, 2]), torch.tensor([5, 9]))
    lora = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    column = torch.full((6,), 0.8)
    logits = randn(6, 700) * 4
    logits[5] = 0.5
    yield "unified_attention", (*attention, *lens), {"max_seqlen_q": 33, "scale": 0.1}
    sinks = {"softcap": 3.0, "window": 7, "sinks": torch.linspace(-1, 1, 6)}
    yield "unified_attention", (*attention, *lens), {"max_seqlen_q": 33, "scale": 0.1, **sinks}
    yield "unified_attention", (*attention, *lens), {"max_seqlen_q": 33, "scale": 0.1, "softcap": 3.0}
    q = case.q[tokens]
    yield "paged_attention_decode", (q, *attention[1:], case.block_table, case.seq_lens), {"scale": 0.1}
    e4m3 = [cache.to(E4M3), cache.to(E4M3)]
    yield (
        "qk_norm_rope_and_cache",
        (randn(4, 96), zero, randn(3, 16), zero + rows[:4] - 1, *e4m3),
        {"q_norm": x[0, :16]},
    )
    yield "fused_add_rms_norm", (x.clone(), x.clone(), x[0], 1e-5), {"token_scale": torch.empty(4, 1)}
    yield "fused_add_rms_norm", (x.clone(), None, x[0], 1e-5), {"gemma": True, "quant_scale": 0.5}
    yield "fused_linear", (x, x, x[:, 0]), {"norm": RowNorm(torch.ones(4, 2), x[0], 1e-5, False), "gate": "silu"}
    yield "fused_linear", (x, x), {"residual": torch.ones(4, 4), "squares": torch.empty(4, 1)}
    for name in ("silu_and_mul", "gelu_tanh_and_mul"):
        yield name, (x,), {}
        yield name, (x,), {"quant_scale": torch.ones(1)}
        yield name, (x,), {"token_scale": torch.empty(4, 1)}
    yield "scaled_fp8_quant", (x,), {"group_size": 16}
    yield "fp8_gemm", (codes, codes, scale, torch.ones(2, 4)), {"bias": x[:, 0]}
    yield "w4a16_gemm", (x, words, scales, None), {"group_size": 32}
    yield "w8a16_gemm", (x[:, :32], words, scales, scales), {"group_size": 16}
    yield "topk_softmax", (x, 3, True), {}
    yield "moe_align_block_size", (ids, 4, 2), {}
    yield "fused_moe", (x, randn(2, 32, 64), randn(2, 64, 16), weights, ids), {}
    packed = {"w13_scales": torch.ones(2, 2, 128), "w2_scales": torch.ones(2, 2, 64), "bits": 4, "group_size": 32}
    yield "fused_moe_wna16", (x, w13, w2, weights, ids), packed
    yield "lora_shrink", (x, randn(2, 4, 64), lora), {"scaling": torch.ones(2)}
    yield "lora_expand", (x[:, :4], randn(2, 64, 4), lora), {"out": x.clone()}
    yield "copy_blocks_", (cache.clone(), cache.clone(), torch.tensor([[0, 1], [2, 0]])), {}
    yield "swap_blocks", (cache, cache.clone(), torch.tensor([[0, 1], [2, 0]])), {}
    listed = {"bias_rows": entries[0], "bias_token_ids": entries[1], "bias_values": torch.ones(2)}
    listed |= {"seen_rows": entries[0], "seen_token_ids": entries[1], "seen_output_counts": torch.ones(2)}
    listed |= dict.fromkeys(("temperature", "repetition_penalty", "presence_penalty"), column)
    bits = {"bitmask": torch.ones(2, 22, dtype=torch.int32), "mask_rows": torch.tensor([1, 3])}
    yield "apply_logits_processors_", (logits.clone(),), {**listed, **bits}
    top_k, top_p = torch.tensor([0, 5, 0, 700, 300, 0]), torch.tensor([1.0, 1.0, 0.7, 0.9, 0.5, 1.0])
    yield "sample", (logits, column, top_k, top_p, column - 0.8, rows, rows), {"num_logprobs": 3}
    yield "sample", (logits, column, top_k, top_p, column - 0.5, rows, rows), {"num_logprobs": 0}


def flat(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if part is not None]


def test_every_op_is_called(case):
    assert {name for name, _, _ in calls(case)} == set(OP_NAMES)


@pytest.mark.parametrize("name", OP_NAMES)
def test_tensors_are_made_where_the_arguments_are(case, name):
    op = getattr(select_ops(kernels.Capability(90, 132), dtype=torch.bfloat16, overrides={"all": "torch"}), name)
    expected = [op(*args, **options) for other, args, options in calls(case) if other == name]
    again = [(args, options) for other, args, options in calls(case) if other == name]
    with torch.device("meta"):
        got = [op(*args, **options) for args, options in again]
    for result, other in zip(got, expected, strict=True):
        for tensor, reference in zip(flat(result), flat(other), strict=True):
            assert tensor.device.type == "cpu"
            assert torch.equal(tensor.float(), reference.float())
