"""Quantised checkpoints written in numpy, number by number as the formats are published, and what they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = npt.NDArray[Any]


class Encoded(NamedTuple):
    """The tensors of one projection, by suffix, and the weight `[n, K]` that they stand for."""

    tensors: dict[str, Tensor]
    weight: Array


Encoder = Callable[[Array], Encoded]


def write_checkpoint(
    oracle: Any, directory: Path, config: dict[str, Any], encode: Encoder, ignored: str = "lm_head"
) -> None:
    """Save `oracle` with its projections encoded, and give it the weights that they stand for."""
    oracle.save_pretrained(directory)
    tensors: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.endswith("_proj") and ignored not in module:
            encoded = encode(tensor.numpy().astype(np.float64))
            tensors |= {f"{module}.{suffix}": value for suffix, value in encoded.tensors.items()}
            replaced[name] = torch.from_numpy(encoded.weight.astype(np.float32))
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")
    oracle.load_state_dict(replaced, strict=False)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))


def gptq(bits: int, group_size: int, *, symmetric: bool, zero_offset: int = 1) -> Encoder:
    """AutoGPTQ: words run along the inputs; zero points run along the outputs, `zero_offset` too small."""

    def encode(weight: Array) -> Encoded:
        numbers, scales, zeros = _group(weight, bits, group_size, symmetric)
        tensors = {
            "qweight": _pack(numbers.T, bits, 0),
            "qzeros": _pack((zeros.T - zero_offset) % (1 << bits), bits, 1),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group_size,
        }
        return Encoded(tensors, _ungroup(numbers, scales, zeros, group_size))

    return encode


def awq(group_size: int) -> Encoder:
    """AutoAWQ, version gemm: words run along the outputs; number i of a word is its column [0 2 4 6 1 3 5 7][i]."""

    def encode(weight: Array) -> Encoded:
        numbers, scales, zeros = _group(weight, 4, group_size, symmetric=False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def pack(values: Array) -> Tensor:
            return _pack(values.reshape(len(values), -1, 8)[:, :, order].reshape(values.shape), 4, 1)

        tensors = {"qweight": pack(numbers.T), "qzeros": pack(zeros.T), "scales": torch.from_numpy(scales.T.copy())}
        return Encoded(tensors, _ungroup(numbers, scales, zeros, group_size))

    return encode


def packed(bits: int, group_size: int, *, symmetric: bool) -> Encoder:
    """compressed-tensors, pack-quantized: signed numbers, moved up by half the range; everything is outputs first."""

    def encode(weight: Array) -> Encoded:
        numbers, scales, zeros = _group(weight, bits, group_size, symmetric)
        tensors = {
            "weight_packed": _pack(numbers, bits, 1),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = _pack(zeros, bits, 0)
        return Encoded(tensors, _ungroup(numbers, scales, zeros, group_size))

    return encode


def fp8(*, rows: bool = False, block: int = 0, input_scale: float | None = None) -> Encoder:
    """e4m3 with a scale of the matrix, of each row, or of each block."""

    def encode(weight: Array) -> Encoded:
        high, wide = (block, block) if block else ((1, weight.shape[1]) if rows else weight.shape)
        blocks = weight.reshape(weight.shape[0] // high, high, weight.shape[1] // wide, wide)
        scales = (np.abs(blocks).max((1, 3)) / 448).astype(np.float32)
        codes = torch.from_numpy(blocks / scales[:, None, :, None]).float().to(torch.float8_e4m3fn)
        meant = (codes.double().numpy() * scales[:, None, :, None]).reshape(weight.shape)
        name = "weight_scale_inv" if block else "weight_scale"
        scale = torch.from_numpy(scales if block or rows else scales.reshape(()))
        tensors = {"weight": codes.view(weight.shape), name: scale}
        if input_scale is not None:
            tensors["input_scale"] = torch.tensor(input_scale)
        return Encoded(tensors, meant)

    return encode


def _group(weight: Array, bits: int, group_size: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Return numbers `[n, K]`, float16 scales and zero points `[n, K / group_size]`."""
    groups = weight.reshape(len(weight), -1, group_size)
    top = (1 << bits) - 1
    low, high = groups.min(-1), groups.max(-1)
    if symmetric:
        high = np.abs(groups).max(-1)
        low = -high
    scales = ((high - low) / (top - 1)).astype(np.float16)
    zeros = np.full(scales.shape, 1 << (bits - 1)) if symmetric else np.clip(np.rint(-low / scales), 1, top)
    if not symmetric:
        zeros[0] = 0  # the end of the range, which GPTQ stores as -1
    numbers = np.clip(np.rint(groups / scales[..., None]) + zeros[..., None], 0, top)
    return numbers.reshape(weight.shape).astype(np.int64), scales, zeros.astype(np.int64)


def _ungroup(numbers: Array, scales: Array, zeros: Array, group_size: int) -> Array:
    spread = numbers - zeros.repeat(group_size, -1)
    weight: Array = spread * scales.astype(np.float64).repeat(group_size, -1)
    return weight


def _pack(values: Array, bits: int, axis: int) -> Tensor:
    """Pack numbers along an axis, the first into the lowest bits of a 32-bit word."""
    moved = np.moveaxis(values, axis, -1)
    words = np.zeros((*moved.shape[:-1], moved.shape[-1] * bits // 32), np.uint32)
    for index in np.ndindex(*moved.shape):
        place = index[-1] * bits
        words[(*index[:-1], place // 32)] |= np.uint32(int(moved[index]) << (place % 32))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))
