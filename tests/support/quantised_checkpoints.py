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
    written: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.endswith("_proj") and ignored not in module:
            encoded = encode(tensor.numpy().astype(np.float64))
            written |= {f"{module}.{suffix}": value for suffix, value in encoded.tensors.items()}
            replaced[name] = torch.from_numpy(encoded.weight.astype(np.float32))
        else:
            tensors[name] = tensor
    save_file(written | tensors, directory / "model.safetensors")
    oracle.load_state_dict(replaced, strict=False)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))


def gptq(bits: int, group_size: int | None, *, symmetric: bool, zero_offset: int = 1, ordered: bool = False) -> Encoder:
    """AutoGPTQ: words run along the inputs; zero points run along the outputs, `zero_offset` too small.

    Checked against QuantLinear of AutoGPTQ 0.7.1 (`pack` bit by bit, `forward` of the unit matrix): input i has the
    scale of group g_idx[i], and there is a bias, of zeros, where the layer has none.
    """

    def encode(weight: Array) -> Encoded:
        size = group_size or weight.shape[1]
        index = _index(weight.shape[1], size, ordered)
        numbers, scales, zeros, meant = _indexed(weight, bits, size, symmetric, index)
        tensors = {
            "qweight": _pack(numbers.T, bits, 0),
            "qzeros": _pack((zeros.T - zero_offset) % (1 << bits), bits, 1),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
            "bias": torch.zeros(len(weight), dtype=torch.float16),
        }
        return Encoded(tensors, meant)

    return encode


def awq(group_size: int) -> Encoder:
    """AutoAWQ, version gemm: words run along the outputs; number i of a word is its column [0 2 4 6 1 3 5 7][i].

    Checked against WQLinear_GEMM of AutoAWQ 0.2.9 (`from_linear` bit by bit, `dequantize_gemm`).
    """

    def encode(weight: Array) -> Encoded:
        numbers, scales, zeros = _group(weight, 4, group_size, symmetric=False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def pack(values: Array) -> Tensor:
            return _pack(values.reshape(len(values), -1, 8)[:, :, order].reshape(values.shape), 4, 1)

        tensors = {"qweight": pack(numbers.T), "qzeros": pack(zeros.T), "scales": torch.from_numpy(scales.T.copy())}
        return Encoded(tensors, _ungroup(numbers, scales, zeros, group_size))

    return encode


def packed(bits: int, group_size: int | None, *, symmetric: bool, ordered: bool = False) -> Encoder:
    """compressed-tensors, pack-quantized: signed numbers, moved up by half the range; everything is outputs first.

    Checked against the compressor of compressed-tensors 0.20.0, bit by bit; the index, which older versions wrote,
    against `dequantize` of 0.9.4.
    """

    def encode(weight: Array) -> Encoded:
        size = group_size or weight.shape[1]
        index = _index(weight.shape[1], size, ordered)
        numbers, scales, zeros, meant = _indexed(weight, bits, size, symmetric, index)
        tensors = {
            "weight_packed": _pack(numbers, bits, 1),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = _pack(zeros, bits, 0)
        if ordered:
            tensors["weight_g_idx"] = torch.from_numpy(index)
        return Encoded(tensors, meant)

    return encode


def int8() -> Encoder:
    """compressed-tensors, int-quantized: signed numbers with a scale of each row."""

    def encode(weight: Array) -> Encoded:
        numbers, scales, zeros = _group(weight, 8, weight.shape[1], symmetric=True)
        tensors = {
            "weight": torch.from_numpy((numbers - 128).astype(np.int8)),
            "weight_scale": torch.from_numpy(scales),
        }
        return Encoded(tensors, _ungroup(numbers, scales, zeros, weight.shape[1]))

    return encode


def fp8(
    *, rows: bool = False, block: int = 0, input_scale: float | None = None, like_transformers: bool = False
) -> Encoder:
    """e4m3 with a scale of the matrix, of each row, or of each block; transformers has its own names for scales."""

    def encode(weight: Array) -> Encoded:
        high, wide = (block, block) if block else ((1, weight.shape[1]) if rows else weight.shape)
        blocks = weight.reshape(weight.shape[0] // high, high, weight.shape[1] // wide, wide)
        scales = (np.abs(blocks).max((1, 3)) / 448).astype(np.float32)
        codes = torch.from_numpy(blocks / scales[:, None, :, None]).float().to(torch.float8_e4m3fn)
        meant = (codes.double().numpy() * scales[:, None, :, None]).reshape(weight.shape)
        name = "weight_scale_inv" if block or like_transformers else "weight_scale"
        scale = torch.from_numpy(scales if block or rows else scales.reshape(()))
        tensors = {"weight": codes.view(weight.shape), name: scale}
        if input_scale is not None:
            tensors["activation_scale" if like_transformers else "input_scale"] = torch.tensor(input_scale)
        return Encoded(tensors, meant)

    return encode


def _index(num_inputs: int, group_size: int, ordered: bool) -> Array:
    """Return the group of every input: consecutive ones, or, `ordered`, some permutation that depends on the number."""
    groups = np.arange(num_inputs) // group_size
    return np.random.default_rng(num_inputs).permutation(groups) if ordered else groups


def _indexed(
    weight: Array, bits: int, group_size: int, symmetric: bool, index: Array
) -> tuple[Array, Array, Array, Array]:
    """Return numbers, scales and zero points as `_group`, of groups that `index` tells, and what they stand for."""
    order = np.argsort(index, kind="stable")
    numbers, scales, zeros = _group(weight[:, order], bits, group_size, symmetric)
    meant = _ungroup(numbers, scales, zeros, group_size)
    back = np.argsort(order)
    return numbers[:, back], scales, zeros, meant[:, back]


def _group(weight: Array, bits: int, group_size: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Return numbers `[n, K]`, float16 scales and zero points `[n, K / group_size]`."""
    groups = np.ascontiguousarray(weight).reshape(len(weight), -1, group_size)
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
