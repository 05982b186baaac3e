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


def definition(heads, weight, gemma, positions, cos_sin):
    """RMSNorm with the weight, if any, and rotation of [T, H, D], in float64."""
    x = heads.double()
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (weight.double() + (1 if gemma else 0))
    cos, sin = cos_sin[positions].double().unsqueeze(1).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def call(ops_or_reference, args, **options):
    qkv, *rest, k_cache, v_cache = args
    head_dim = k_cache.shape[-1]
    out_q = torch.full((qkv.shape[0], qkv.shape[1] // head_dim - 2 * k_cache.shape[2], head_dim), torch.nan).to(
        qkv.dtype
    )
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    assert ops_or_reference(qkv, *rest, k_cache, v_cache, out_q=out_q, **options) is out_q
    return out_q, k_cache, v_cache


@pytest.mark.parametrize("norm", [None, "llama", "gemma"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 96), (4, 1, 128), (7, 1, 64), (8, 1, 256)]
)
def test_values_and_what_is_touched(ops, dtype, norm, q_heads, kv_heads, head_dim):
    args = make(dtype, q_heads, kv_heads, head_dim)
    qkv, positions, cos_sin, slots, _, _ = args
    before = qkv.clone()
    q_norm = None if norm is None else randn(head_dim, dtype=dtype, seed=5)
    k_norm = None if norm is None else randn(head_dim, dtype=dtype, seed=6)
    options = {"q_norm": q_norm, "k_norm": k_norm, "gemma": norm == "gemma"}
    out_q, k_cache, v_cache = call(ops.qk_norm_rope_and_cache, args, **options)
    assert torch.equal(qkv, before)

    heads = qkv.view(len(qkv), -1, head_dim)
    q, k, v = heads[:, :q_heads], heads[:, q_heads:-kv_heads], heads[:, -kv_heads:]
    tolerance = TOLERANCE[dtype] * (
        1 if norm is None else 3
    )  # one more rounding or two, of values up to 4 times larger
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(out_q.double(), definition(q, q_norm, norm == "gemma", positions, cos_sin), **close)
    live = slots >= 0
    written = k_cache.flatten(0, 1)[slots[live]].double()
    torch.testing.assert_close(written, definition(k, k_norm, norm == "gemma", positions, cos_sin)[live], **close)
    assert torch.equal(v_cache.flatten(0, 1)[slots[live]], v[live])
    for cache in (k_cache, v_cache):  # nothing else was written
        assert cache.flatten(0, 1).isnan().all(-1).all(-1).sum() == 4 * 16 - live.sum()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_e4m3_codes_are_those_of_the_torch_form(ops, dtype, norm):
    args = make(dtype, 4, 2, 64, tokens=6, cache_dtype=E4M3)
    args[0].mul_(300)  # beyond +-448 / scale
    options = {"k_scale": 0.5, "v_scale": torch.tensor(0.7)}
    if norm:
        options |= {"q_norm": randn(64, dtype=dtype, seed=5), "k_norm": randn(64, dtype=dtype, seed=6) * 400}
    q, k_cache, v_cache = call(ops.qk_norm_rope_and_cache, args, **options)
    expected_q, expected_k, expected_v = call(qk_norm_rope_and_cache, args, **options)
    torch.testing.assert_close(q, expected_q, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-4)
    assert torch.equal(v_cache.view(torch.uint8), expected_v.view(torch.uint8))
    # The order in which squares are summed may move a value over the edge of a rounding interval, to the next code.
    distance = (k_cache.view(torch.uint8).int() - expected_k.view(torch.uint8).int()).abs()
    assert distance.max() <= 1
    assert (distance > 0).float().mean() < 0.01
    live = args[3] >= 0
    assert k_cache.flatten(0, 1)[args[3][live]].float().abs().max() == 448


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
