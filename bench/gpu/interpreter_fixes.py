"""Makes Triton's interpreter right for bfloat16 and 8-bit floats, which it keeps as bare bits.

Unchanged (seen in 3.6.0, 3.7.1 and 3.9.0) it multiplies and adds those bits as if they were integers, cuts float32 to
bfloat16 instead of rounding to nearest even, and is wrong by a factor of two where rounding to e4m3 carries into the
exponent. With these methods casts equal torch's bit by bit, and arithmetic is done in float32 and rounded once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_BITS = {
    tl.bfloat16: (torch.int16, np.int16),
    tl.float8e4nv: (torch.uint8, np.uint8),
    tl.float8e5: (torch.uint8, np.uint8),
}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}  # the GPU saturates: cvt.rn.satfinite
_COMPARISONS = {np.less, np.greater, np.less_equal, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}


def _to_torch(data: np.ndarray, dtype: Any) -> torch.Tensor:
    data = np.ascontiguousarray(data).copy()
    if dtype in _BITS:
        return torch.from_numpy(data.view(_BITS[dtype][1])).view(_TORCH[dtype])
    return torch.from_numpy(data)


def _from_torch(values: torch.Tensor, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    if dtype in _BITS:
        values = values.contiguous().view(_BITS[dtype][0])
    return np.asarray(values.numpy()).view(interpreter._get_np_dtype(dtype)).reshape(shape)


def _convert(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    values = _to_torch(data, source)
    if target in _LARGEST:
        values = values.float().clamp(-_LARGEST[target], _LARGEST[target])  # keeps NaN
    return _from_torch(values.to(_TORCH[target]), target, np.shape(data))


def _float32(handle: TensorHandle) -> np.ndarray:
    return _convert(handle.data, handle.dtype.scalar, tl.float32)


def _rounded(values: np.ndarray, dtype: Any) -> TensorHandle:
    return TensorHandle(_convert(values, tl.float32, dtype), dtype)


def install(patch: Callable[[object, str, object], None] = setattr) -> None:
    """Replace the methods of the interpreter; `patch` sets an attribute (pytest's monkeypatch undoes it)."""
    plain_cast, plain_convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    plain_binary, plain_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    plain_fma, plain_dot = InterpreterBuilder.create_fma, InterpreterBuilder.create_dot

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in _TORCH and target in _TORCH and (source in _BITS or target in _BITS):
            return TensorHandle(_convert(src.data, source, target), target)
        if source in _BITS:
            integers = _float32(src).astype(interpreter._get_np_dtype(target))
            return TensorHandle(integers, target)
        if target in _BITS:
            return _rounded(src.data.astype(np.float32), target)
        return plain_cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        towards_zero = rounding_mode is not None and "RTZ" in str(rounding_mode).upper()
        if source in _TORCH and target in _TORCH and not towards_zero:
            return TensorHandle(_convert(src.data, source, target), target)
        return plain_convert(self, src, dst_type, rounding_mode)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        dtype = lhs.dtype.scalar
        if dtype not in _BITS or rhs.dtype.scalar != dtype or op in _BITWISE:
            return plain_binary(self, lhs, rhs, op)
        result = op(_float32(lhs), _float32(rhs))
        return TensorHandle(result, tl.int1) if op in _COMPARISONS else _rounded(result, dtype)

    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        dtype = arg.dtype.scalar
        return _rounded(op(_float32(arg)), dtype) if dtype in _BITS else plain_unary(self, arg, op)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        dtype = z.dtype.scalar
        if dtype not in _BITS:
            return plain_fma(self, x, y, z)
        return _rounded(_float32(x) * _float32(y) + _float32(z), dtype)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        if a.dtype.scalar not in _BITS and b.dtype.scalar not in _BITS:
            return plain_dot(self, a, b, d, *rest)
        dtype = d.dtype.scalar
        total = np.matmul(_float32(a), _float32(b)) + _convert(d.data, dtype, tl.float32)
        return TensorHandle(_convert(total, tl.float32, dtype), dtype)

    for method in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_fma, create_dot):
        patch(InterpreterBuilder, method.__name__, method)
