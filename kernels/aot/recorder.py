"""Determines which variants an op launches, by calling it on tensors without memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalellm.kernels.capability import Capability
from scalellm.kernels.dispatch import select_ops
from scalellm.kernels.launch import Launch, complete
from scalellm.kernels.spec.case import Case
from scalellm.kernels.tiles import Tile, tuned_devices

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_ALIGNED = [["tt.divisibility", 16]]  # as torch's allocator gives it: allows loads of 128 bits
NUM_SMS = {80: 108, 89: 142, 90: 132, 100: 148}


@dataclass(frozen=True, slots=True)
class Variant:
    """The compiler's inputs for one launch."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[object]]]
    options: dict[str, int]


class Recorder(Launch):
    """Records launches instead of making them."""

    def __init__(self, capability: Capability, name: str) -> None:
        super().__init__(capability)
        self.variants: list[Variant] = []
        self.tiles: list[Tile] = []  # the tiles that were chosen from tables, unchanged
        self._name = name

    def tile(self, op: str, **sizes: int) -> Tile:
        """Choose a tile from the table, record it, and return it."""
        self.tiles.append(super().tile(op, **sizes))
        return self.tiles[-1]

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 2,
        **constexprs: Any,
    ) -> None:
        """Record the launch. Refuses an empty grid, because a case that compiles nothing is a mistake."""
        if 0 in grid:
            raise ValueError(f"{self._name}: {kernel.__name__} was launched with the empty grid {grid}")
        tail, more_options = complete(kernel, self.capability, args, constexprs)
        values = (*args, *tail)
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[object]]] = {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
            if i >= len(args) or value is None:
                signature[name] = "constexpr"
                constants[i,] = value
            elif isinstance(value, Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                attributes[i,] = list(_ALIGNED)
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        options = {"num_warps": num_warps, "num_stages": num_stages, **more_options}
        name = f"{self._name} {kernel.__name__}"
        before = sum(variant.kernel is kernel for variant in self.variants)
        if before:  # with other constexprs, as a rule: both are to be seen
            name = f"{name} {before + 1}"
        self.variants.append(Variant(name, kernel, signature, constants, attributes, options))


def record(case: Case, sm: int) -> list[Variant]:
    """Return the variants that a case launches on a device of compute capability `sm` / 10, of any name.

    Those of a device with tile tables of its own are left out where they are the same as without.
    """
    variants = recorded(case, Capability(sm, NUM_SMS[sm])).variants
    for device in tuned_devices(sm):
        same = [_identity(variant) for variant in variants]
        others = recorded(case, Capability(sm, NUM_SMS[sm], device)).variants
        variants = variants + [variant for variant in others if _identity(variant) not in same]
    return variants


def recorded(case: Case, capability: Capability) -> Recorder:
    """Call a case's op for a device, and return the recorded launches."""
    recorder = Recorder(capability, f"{case.name} [{capability.name}]" if capability.name else case.name)
    case.trace(select_ops(recorder.capability, dtype=case.dtype, launch=recorder))
    if not recorder.variants:
        raise ValueError(f"{case.name}: launched no kernel")
    return recorder


def _identity(variant: Variant) -> tuple[object, ...]:
    return variant.kernel, variant.signature, variant.constexprs, variant.options
