import pytest
import torch

from scalellm.kernels import fp8_gemm, scaled_fp8_quant, w4a16_gemm, w8a16_gemm
from scalellm.kernels.reference.scaled_mm import can_scale_mm, scaled_mm

E4M3 = torch.float8_e4m3fn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group_size", [None, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_scales_use_the_whole_range(dtype, group_size):
    x = (randn(5, 64) * 30).to(dtype)
    x[2] = 0
    q, s = scaled_fp8_quant(x, group_size=group_size)
    groups = q.float().view(5, -1, group_size or 64)
    assert q.dtype == E4M3
    assert s.shape == (5, groups.shape[1])
    largest = groups.abs().amax(-1)
    assert (largest[2] == 0).all()
    assert (largest[[0, 1, 3, 4]] == 448).all()
    restored = (groups * s.unsqueeze(-1)).view(5, 64)
    torch.testing.assert_close(restored, x.float(), rtol=2**-4, atol=float(s.max()) * 2**-9)


def test_static_scale_clamps_and_out_is_written():
    x = randn(3, 8) * 1000
    scale = torch.tensor([0.5])
    q, s = scaled_fp8_quant(x, scale)
    assert torch.equal(q.float(), (x / 0.5).clamp(-448, 448).to(E4M3).float())
    assert s is scale
    out = (torch.empty(3, 8, dtype=E4M3), torch.empty(3, 1))
    got = scaled_fp8_quant(x, out=out)
    assert got[0] is out[0]
    assert torch.equal(out[1], scaled_fp8_quant(x)[1])


def test_impossible_groups_are_refused():
    with pytest.raises(ValueError, match="group_size: 24 does not divide the 64 columns"):
        scaled_fp8_quant(randn(2, 64), group_size=24)
    with pytest.raises(ValueError, match="group_size"):
        scaled_fp8_quant(randn(2, 64), torch.tensor(1.0), group_size=64)


def test_fp8_gemm_as_torch_scaled_mm():
    (a, a_scale), (b, b_scale) = scaled_fp8_quant(randn(16, 64)), scaled_fp8_quant(randn(32, 64, seed=1))
    bias = randn(32, seed=2)
    expected = torch._scaled_mm(a, b.T, a_scale, b_scale.T.contiguous(), out_dtype=torch.bfloat16)
    got = fp8_gemm(a, b, a_scale, b_scale)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)
    out = torch.full((16, 32), torch.nan)
    assert fp8_gemm(a, b, a_scale, b_scale, bias=bias, out=out) is out
    exact = (a.double() * a_scale) @ (b.double() * b_scale).T + bias
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("private_name", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("a_rows", "b_rows"), [(False, False), (True, True), (False, True), (True, False)])
def test_product_on_the_matrix_units_by_either_name(monkeypatch, private_name, rows, a_rows, b_rows):
    if not private_name:
        if not hasattr(torch.nn.functional, "scaled_mm"):
            pytest.skip("this version of torch has the private name only")
        monkeypatch.delattr(torch, "_scaled_mm")
    a, b = randn(rows, 64).to(E4M3), randn(32, 64, seed=1).to(E4M3)
    a_scale = randn(rows if a_rows else 1, 1, seed=2).abs()
    b_scale = randn(32, 1, seed=3).abs() if b_rows else torch.tensor(0.7)
    out, bias = torch.full((rows, 32), torch.nan, dtype=torch.bfloat16), randn(32, seed=4)
    assert can_scale_mm(a, b, a_scale, b_scale, out)
    assert scaled_mm(a, b, a_scale, b_scale, bias, out) is out
    exact = (a.double() * a_scale) @ (b.double() * b_scale).T + bias
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("fast_sums", [False, True])
def test_sums_are_fast_where_that_is_asked_for(monkeypatch, fast_sums):
    product, asked = torch._scaled_mm, []

    def spy(*args, use_fast_accum, **kwargs):
        asked.append(use_fast_accum)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    monkeypatch.setattr("scalellm.kernels.reference.quant.has_e4m3_units", lambda device: True)
    a, b, one = randn(5, 64).to(E4M3), randn(32, 64).to(E4M3), torch.ones(1)
    out = fp8_gemm(a, b, one, one, fast_sums=fast_sums)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, atol=2e-2, rtol=1e-2)
    assert asked == [fast_sums]


def test_operands_that_the_matrix_units_do_not_take():
    a, b, one = randn(4, 64).to(E4M3), randn(32, 64).to(E4M3), torch.ones(1)
    out = torch.empty(4, 32, dtype=torch.bfloat16)
    assert not can_scale_mm(a, b, torch.ones(4, 4), one, out)  # scales of groups
    assert not can_scale_mm(a, b, one, torch.ones(2, 1), out)  # scales of blocks of rows
    assert not can_scale_mm(a, b, one, one, out.float())
    assert not can_scale_mm(a, b[:20], one, one, out)
    assert not can_scale_mm(a[:, :40], b[:, :40], one, one, out)
    assert not can_scale_mm(a, b.t().contiguous().t(), one, one, out)


def test_scales_that_do_not_fit_are_refused():
    a, b = randn(4, 64).to(E4M3), randn(32, 64, seed=1).to(E4M3)
    with pytest.raises(ValueError, match="does not divide"):
        fp8_gemm(a, b, torch.ones(3, 1), torch.ones(2, 4))
    words, scales = torch.zeros(8, 12, dtype=torch.int32), torch.ones(2, 12)
    with pytest.raises(ValueError, match="scales: shape"):
        w4a16_gemm(randn(5, 64), words, scales[:, :5], None, group_size=32)
    with pytest.raises(ValueError, match="scales: shape"):
        w8a16_gemm(randn(5, 32), words, scales[:, :5], None, group_size=16)
