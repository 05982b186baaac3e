"""Norm, rotation with the cache write, activations and block copies, against transformers and torch."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from scalellm.kernels import Ops, sample, scaled_fp8_quant, swap_blocks
from scalellm.kernels.spec.case import lay_keys

E4M3 = torch.float8_e4m3fn
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of one result
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_rounds_as_transformers(ops, dtype, gemma, with_residual):
    x, weight = randn(7, 96, dtype=dtype), randn(96, dtype=dtype, seed=1)
    residual = randn(7, 96, dtype=dtype, seed=2) if with_residual else None
    hidden = x + residual if residual is not None else x
    module = Gemma3RMSNorm(96, eps=1e-5) if gemma else LlamaRMSNorm(96, eps=1e-5)
    module.weight.data = weight
    expected = module(hidden)
    before, out = x.clone(), torch.full_like(x, torch.nan)
    assert ops.fused_add_rms_norm(x, residual, weight, 1e-5, gemma=gemma, out=out) is out
    # Sums in another order may move a value over the edge of a rounding interval.
    exact = dtype != torch.float32 and ops.backends["fused_add_rms_norm"] == "torch"
    torch.testing.assert_close(out, expected, atol=0 if exact else 1e-6, rtol=0 if exact else ROUNDING[dtype])
    assert torch.equal(x, before)
    if residual is not None:
        assert torch.equal(residual, hidden)
    torch.testing.assert_close(ops.fused_add_rms_norm(x, None, weight, 1e-5, gemma=gemma, out=x), module(before))


def test_rms_norm_accumulates_in_float32(ops):
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # squares overflow float16
    torch.testing.assert_close(ops.fused_add_rms_norm(x, None, torch.ones(4096).half(), 1e-6), torch.ones_like(x))


def test_quantised_results_are_clamped():
    ops = Ops()
    x, weight = randn(3, 64), torch.full((64,), 1000.0)
    expected = ops.fused_add_rms_norm(x, None, weight, 1e-6)
    got = ops.fused_add_rms_norm(x, None, weight, 1e-6, quant_scale=2.0)
    assert got.dtype == E4M3
    assert torch.equal(got.float(), (expected / 2.0).clamp(-448, 448).to(E4M3).float())
    gate_up = randn(3, 64) * 100
    for op in (ops.silu_and_mul, ops.gelu_tanh_and_mul):
        got = op(gate_up, quant_scale=torch.tensor(0.5))
        assert torch.equal(got.float(), (op(gate_up) / 0.5).clamp(-448, 448).to(E4M3).float())
        assert got.float().abs().max() == 448


@pytest.mark.parametrize("dtype", DTYPES)
def test_computed_scales_are_those_of_the_two_ops_one_after_the_other(dtype):
    ops = Ops()
    x, weight = randn(5, 64, dtype=dtype) * 20, randn(32, dtype=dtype, seed=1)
    calls = [lambda **to: ops.fused_add_rms_norm(x[:, :32], None, weight, 1e-6, **to)]
    calls += [lambda op=op, **to: op(x, **to) for op in (ops.silu_and_mul, ops.gelu_tanh_and_mul)]
    for call in calls:
        codes, scales = scaled_fp8_quant(call())
        for out in (None, torch.full((5, 32), torch.nan).to(E4M3)):
            got_scales = torch.full((5, 1), torch.nan)
            got = call(token_scale=got_scales, out=out)
            assert out is None or got is out
            assert torch.equal(got.view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(got_scales, scales)
        with pytest.raises(ValueError, match="token_scale: not possible together with the static quant_scale"):
            call(token_scale=got_scales, quant_scale=1.0)


def rope_case(dtype=torch.float32, q_heads=4, kv_heads=2, head_dim=64, tokens=9, page=16):
    qkv = randn(tokens, (q_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    positions = torch.arange(tokens) * 7
    angles = torch.arange(100).unsqueeze(1) * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    slots = torch.randperm(4 * page, generator=torch.Generator().manual_seed(1))[:tokens]
    cache = torch.full((4, page, kv_heads, head_dim), torch.nan)
    return qkv, positions, cos_sin, slots, cache


def rotate(x, positions, cos_sin):
    half = cos_sin.shape[1] // 2
    cos, sin = (t[positions].repeat(1, 2) for t in (cos_sin[:, :half], cos_sin[:, half:]))
    x = x.double().transpose(0, 1).unsqueeze(0)
    return apply_rotary_pos_emb(x, x, cos.double().unsqueeze(0), sin.double().unsqueeze(0))[0][0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "llama", "gemma"])
def test_rope_turns_as_transformers(ops, dtype, norm):
    q_heads, kv_heads, head_dim = 9, 3, 64
    qkv, positions, cos_sin, slots, cache = rope_case(dtype, q_heads, kv_heads, head_dim)
    slots[3] = -1
    k_cache, v_cache = lay_keys(ops, cache.to(dtype)), cache.to(dtype, copy=True)
    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads[:, :q_heads], heads[:, q_heads : q_heads + kv_heads], heads[:, q_heads + kv_heads :]
    options = {}
    if norm:
        module = (Gemma3RMSNorm if norm == "gemma" else LlamaRMSNorm)(head_dim, eps=1e-5)
        options = {"eps": 1e-5, "gemma": norm == "gemma"}
        for name, seed in (("q_norm", 5), ("k_norm", 6)):
            options[name] = randn(head_dim, dtype=dtype, seed=seed)
        module.weight.data = options["q_norm"]
        q = module(q)
        module.weight.data = options["k_norm"]
        k = module(k)
    out_q, before = torch.full_like(q, torch.nan), qkv.clone()
    args = (qkv, positions, cos_sin, slots, k_cache, v_cache)
    assert ops.qk_norm_rope_and_cache(*args, **options, out_q=out_q) is out_q
    assert torch.equal(qkv, before)

    tolerance = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out_q.double(), rotate(q, positions, cos_sin), atol=tolerance, rtol=tolerance)
    live = slots >= 0
    written_k, written_v = (c.flatten(0, 1)[slots[live]] for c in (k_cache, v_cache))
    torch.testing.assert_close(written_k.double(), rotate(k, positions, cos_sin)[live], atol=tolerance, rtol=tolerance)
    assert torch.equal(written_v, v[live])
    for c in (k_cache, v_cache):  # nothing else was touched
        assert c.flatten(0, 1).isnan().all(-1).all(-1).sum() == 4 * 16 - live.sum()


def test_rope_writes_a_clamped_e4m3_cache(ops):
    qkv, positions, cos_sin, slots, cache = rope_case()
    qkv *= 300
    k_cache, v_cache = lay_keys(ops, cache.to(E4M3)), cache.to(E4M3)
    plain_k, plain_v = lay_keys(ops, cache), cache.clone()
    ops.qk_norm_rope_and_cache(qkv, positions, cos_sin, slots, plain_k, plain_v)
    ops.qk_norm_rope_and_cache(qkv, positions, cos_sin, slots, k_cache, v_cache, k_scale=0.5, v_scale=torch.tensor(2.0))
    for c, plain, scale in ((k_cache, plain_k, 0.5), (v_cache, plain_v, 2.0)):
        got = c.float().flatten(0, 1)[slots]
        expected = (plain.flatten(0, 1)[slots] / scale).clamp(-448, 448).to(E4M3).float()
        assert torch.equal(got, expected)
        assert got.isfinite().all()


def test_what_is_not_there_is_refused(ops):
    qkv, positions, cos_sin, slots, values = rope_case()
    cache = lay_keys(ops, values)
    for wrong in (positions.index_fill(0, torch.tensor([3]), 100), positions.index_fill(0, torch.tensor([3]), -1)):
        with pytest.raises((IndexError, ValueError)):
            ops.qk_norm_rope_and_cache(qkv, wrong, cos_sin, slots, cache, values.clone())
    slots[4] = 4 * 16
    with pytest.raises((IndexError, ValueError)):
        ops.qk_norm_rope_and_cache(qkv, positions, cos_sin, slots, cache, values.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_in_the_cache_is_that_of_a_cast(ops, dtype):
    """All magnitudes: subnormal numbers, ties, and what is clamped, as infinite values would spread."""
    x = torch.cat(
        (torch.linspace(-3e-7, 3e-7, 1024), torch.linspace(-1e-4, 1e-4, 1024), torch.linspace(-7e4, 7e4, 2048))
    )
    x = x.to(dtype).view(16, 4, 64)
    values = torch.zeros(1, 16, 4, 64).half()
    cache = lay_keys(ops, values)
    still, zero = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), dim=1), torch.zeros(16, dtype=torch.int64)
    ops.qk_norm_rope_and_cache(torch.cat((x, x, x), 1).flatten(1), zero, still, torch.arange(16), cache, values.clone())
    assert torch.equal(cache[0], x.float().clamp(-65504, 65504).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_in_the_cache_are_those_of_a_cast(ops, dtype):
    """All magnitudes: subnormal codes, ties, and what is clamped."""
    x = torch.cat((torch.linspace(-0.05, 0.05, 2048), torch.linspace(-600, 600, 2048))).to(dtype).view(16, 4, 64)
    values = torch.zeros(1, 16, 4, 64).to(E4M3)
    cache = lay_keys(ops, values)
    still, zero = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), dim=1), torch.zeros(16, dtype=torch.int64)
    ops.qk_norm_rope_and_cache(
        torch.cat((x, x, x), 1).flatten(1), zero, still, torch.arange(16), cache, values.clone(), k_scale=0.7
    )
    expected = (x.float() / 0.7).clamp(-448, 448).to(E4M3)
    assert torch.equal(cache[0].contiguous().view(torch.uint8), expected.view(torch.uint8))


def test_empty_batches(ops):
    cache, none = torch.zeros(2, 16, 2, 64), torch.zeros(0, dtype=torch.int64)
    q = ops.qk_norm_rope_and_cache(torch.zeros(0, 512), none, torch.zeros(4, 64), none, cache, cache)
    assert q.shape == (0, 4, 64)
    table, lens = torch.zeros(0, 3, dtype=torch.int32), none.int()
    cu = torch.zeros(1, dtype=torch.int32)
    assert ops.unified_attention(q, cache, cache, cu, lens, table, max_seqlen_q=0, scale=1.0).shape == (0, 4, 64)
    assert ops.paged_attention_decode(q, cache, cache, table, lens, scale=1.0).shape == (0, 4, 64)
    assert ops.fused_add_rms_norm(torch.zeros(0, 16), torch.zeros(0, 16), torch.ones(16), 1e-6).shape == (0, 16)
    assert ops.silu_and_mul(torch.zeros(0, 8)).shape == (0, 4)
    column = torch.zeros(0)
    out = sample(torch.zeros(0, 300), column, none, column, column, none, none, num_logprobs=2)
    assert out.token_ids.shape == (0,)
    assert out.top_ids.shape == (0, 2)


def test_swap_blocks_has_no_stream_on_a_cpu():
    src, dst = randn(4, 16, 2, 8), torch.zeros(9, 16, 2, 8)
    with pytest.raises(ValueError, match="stream"):
        swap_blocks(src, dst, torch.tensor([[0, 0]]), torch.Stream(device="cpu"))
