"""The corrected interpreter against torch: the other tests here mean something because these pass."""

import pytest
import torch
import triton
import triton.language as tl

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@triton.jit
def cast(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def arithmetic(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(z_ptr + at, x * y + x)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, E4M3, E5M2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_casts_equal_torch(source, target):
    x = (
        torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 4.0 ** torch.arange(-6, 4).repeat(103)[:1024]
    ).to(source)
    y = torch.empty(1024, dtype=target)
    cast[(1,)](x, y, 1024)
    largest = torch.finfo(target).max
    expected = x.float().clamp(-largest, largest).to(target)
    assert torch.equal(y.float(), expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_products_are_summed_in_float32(dtype):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=g).to(dtype) for _ in range(2))
    c = torch.empty(32, 32)
    product[(1,)](a, b, c, 32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=1e-5, rtol=1e-5)


def test_bfloat16_arithmetic_rounds_each_result():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, generator=g).bfloat16() for _ in range(2))
    z = torch.empty_like(x)
    arithmetic[(1,)](x, y, z, 256)
    assert torch.equal(z, x * y + x)
