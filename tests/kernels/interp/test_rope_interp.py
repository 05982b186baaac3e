"""Norm, rotation and cache write: the values against float64, their rounding and e4m3 codes against the torch form."""

import pytest
import torch

from scalellm.kernels import qk_norm_rope_and_cache
from virtual_memory import virtual_tensor

E4M3 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(dtype, q_heads, kv_heads, head_dim, tokens=3, page=16, cache_dtype=None):
    qkv = randn(tokens, (q_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    positions = torch.arange(tokens) * 7
    angles = torch.arange(40).unsqueeze(1) * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    slots = torch.randperm(4 * page, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[1] = -1
    k_cache = torch.full((4, page, kv_heads, head_dim), torch.nan).to(cache_dtype or dtype)
    return qkv, positions, torch.cat((angles.cos(), angles.sin()), dim=1), slots, k_cache, k_cache.clone()


def call(ops_or_reference, args, **options):
    qkv, *rest, k_cache, v_cache = args
    head_dim = k_cache.shape[-1]
    out_q = torch.full((qkv.shape[0], qkv.shape[1] // head_dim - 2 * k_cache.shape[2], head_dim), torch.nan).to(
        qkv.dtype
    )
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    assert ops_or_reference(qkv, *rest, k_cache, v_cache, out_q=out_q, **options) is out_q
    return out_q, k_cache, v_cache


def test_one_norm_without_the_other_and_a_wider_cache(ops):
    args = make(torch.bfloat16, 4, 2, 64, cache_dtype=torch.float32)
    weight = randn(64, dtype=torch.bfloat16, seed=5)
    for options in ({"q_norm": weight}, {"k_norm": weight}):
        for got, expected in zip(
            call(ops.qk_norm_rope_and_cache, args, **options),
            call(qk_norm_rope_and_cache, args, **options),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2, equal_nan=True)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(6, 2), (7, 1)])
def test_rows_left_over_by_the_group_write_nothing(ops, last_program_first, q_heads, kv_heads):
    args = make(torch.bfloat16, q_heads, kv_heads, 64)
    before = call(ops.qk_norm_rope_and_cache, args)
    last_program_first()
    for tensor, other in zip(call(ops.qk_norm_rope_and_cache, args), before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0))


def test_rows_of_a_wider_tensor(ops):
    args = make(torch.float32, 4, 2, 64)
    wide = torch.full((3, 600), torch.nan)
    wide[:, 20:532] = args[0]
    expected = call(ops.qk_norm_rope_and_cache, args)
    for tensor, other in zip(call(ops.qk_norm_rope_and_cache, (wide[:, 20:532], *args[1:])), expected, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0))


def test_no_tokens(ops):
    args = make(torch.float32, 4, 2, 64)
    empty = (args[0][:0], args[1][:0], args[2], args[3][:0], *args[4:])
    assert call(ops.qk_norm_rope_and_cache, empty)[0].shape == (0, 4, 64)


def test_slots_past_two_to_the_31_elements(ops):
    blocks = 1_050_000
    cache, values = (virtual_tensor(blocks, 16, 1, 128, dtype=torch.float16) for _ in range(2))
    assert cache.numel() > 2**31
    qkv = randn(1, 3 * 128, dtype=torch.float16)
    slots = torch.tensor([blocks * 16 - 1])
    cos_sin = torch.cat((torch.ones(1, 64), torch.zeros(1, 64)), dim=1)
    ops.qk_norm_rope_and_cache(qkv, torch.tensor([0]), cos_sin, slots, cache, values)
    assert torch.equal(cache[-1, -1, 0], qkv[0, 128:256])
    assert torch.equal(values[-1, -1, 0], qkv[0, 256:])
