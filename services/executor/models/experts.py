"""The weights of a layer's experts: a linear layer for each in the checkpoint, stacked tensors for the op."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from scalellm.kernels import WNA16_INTERLEAVE, Ops
from scalellm.kernels.cpu.gemm_dense import TiledMatrix
from scalellm.kernels.cpu.gemm_wna16 import TiledWeight
from scalellm.kernels.cpu.moe import TiledExperts
from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.models.linear import (
    CheckpointFormat,
    DenseWeight,
    Fp8Weight,
    IntWeight,
    LinearWeight,
    bias_slots,
    build_weight,
    inner_border,
)
from scalellm.services.executor.models.linear.packing import interleave_rows_
from scalellm.services.executor.models.linear.stored_ints import StoredInts
from scalellm.services.executor.models.runtime import ModelRuntime
from scalellm.services.executor.models.shard import Part
from scalellm.services.executor.models.weight_slot import WeightSlot, finish_with


class Experts:
    """The gated MLPs of a layer's experts, in full precision or quantised as linear layers are.

    `parts` are the names of an expert's gate, up and down projections under `prefix.<number>`. Inputs are not
    quantised, whatever the weights are. Raises UnsupportedModelError for weights that there is no op for.
    """

    def __init__(self, prefix: str, parts: tuple[str, str, str], config: ModelConfig, runtime: ModelRuntime) -> None:
        hidden, inner, stored = config.hidden_size, Part.all(config.moe_intermediate_size), config.stored_linears
        gate, up, down = parts
        shard = runtime.shard
        # The op takes one group size for both products, whose inner dimensions differ.
        wanted = runtime.quantization
        wanted = replace(wanted, group_size=math.gcd(wanted.group_size, hidden, inner.whole))
        runtime = replace(runtime, quantization=wanted)
        self._own = shard.experts(config)
        if not shard.is_whole:
            names_of_first = [f"{prefix}.0.{part}" for part in parts]
            border = inner_border(names_of_first, hidden, inner.whole, stored, runtime)
            inner = shard.inner_of_experts(prefix, inner.whole, border)
        if isinstance(stored, StoredInts):
            stored = replace(stored, longest_group=math.gcd(hidden, inner.whole, inner.size))
        names = [f"{prefix}.{number}" for number in range(self._own.start, self._own.stop)]
        outer = Part.all(hidden)
        w13 = _Stack([{f"{name}.{gate}": inner, f"{name}.{up}": inner} for name in names], outer, stored, runtime)
        w2 = _Stack([{f"{name}.{down}": outer} for name in names], inner, stored, runtime)
        self._slots = [*w13.slots, *w2.slots]
        self._product = _product(prefix, w13, w2, runtime.ops)
        finish_with(partial(self._finish, w13, w2, runtime), self._slots)
        self._collectives = None if shard.is_whole else shard.collectives

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """`x [T, H]` -> `[T, H]`; weights `[T, k]` f32 and ids `[T, k]` i32 as `kernels.topk_softmax` returns them.

        A rank computes its own experts for all tokens, and the results of all ranks are added up.
        """
        if self._own.is_cut:
            is_own = (ids >= self._own.start) & (ids < self._own.stop)
            weights = torch.where(is_own, weights, 0.0)
            # The op wants a number of each: what is another rank's adds nothing.
            ids = torch.where(is_own, ids - self._own.start, 0)
        y = self._product(x, weights=weights, ids=ids)
        return y if self._collectives is None else self._collectives.all_reduce(y.contiguous())

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Yield the slots of every expert."""
        yield from self._slots

    def _finish(self, w13: "_Stack", w2: "_Stack", runtime: ModelRuntime) -> None:
        """Put the weights into the order in which C++ or Triton multiplies them, if one of them does."""
        self._product = _tiled(w13, w2, runtime) or _interleaved(w13, w2, self._product, runtime.ops)


class _Stack:
    """A weight for each expert, all of one form. What the weights allocate are the parts of tensors `[E, ...]`."""

    def __init__(
        self,
        experts: Sequence[Mapping[str, Part]],
        in_features: Part,
        stored: CheckpointFormat | None,
        runtime: ModelRuntime,
    ) -> None:
        self._runtime = runtime
        self._names = [next(iter(named)) for named in experts]
        self._wholes: list[Tensor] = []
        self.slots: list[WeightSlot] = []
        for number, named in enumerate(experts):
            parts: list[Tensor] = []
            allocate = partial(self._allocate, number, parts)
            weight, slots = build_weight(named, in_features, stored, replace(runtime, allocate=allocate))
            if number == 0:
                self.first, self._parts_of_first = weight, parts
            if type(weight) is not type(self.first) or len(parts) != len(self._wholes):
                raise self._unlike(number)
            self.slots += [*slots, *bias_slots(named, None, stored)]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self._names)

    def whole(self, part: Tensor) -> Tensor:
        """Return the tensor `[E, ...]` of which a tensor of `first` is the part."""
        return next(whole for whole, mine in zip(self._wholes, self._parts_of_first, strict=True) if mine is part)

    def _allocate(
        self, expert: int, parts: list[Tensor], shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if expert == 0:
            self._wholes.append(self._runtime.allocate((len(self._names), *shape), dtype=dtype, device=device))
        whole = self._wholes[len(parts)] if len(parts) < len(self._wholes) else None
        if whole is None or whole.shape[1:] != shape or whole.dtype != dtype:
            raise self._unlike(expert)
        parts.append(whole[expert])
        return parts[-1]

    def _unlike(self, expert: int) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._names[expert]} is not quantised as {self._names[0]} is")


def _product(prefix: str, w13: _Stack, w2: _Stack, ops: Ops) -> Callable[..., Tensor]:
    """Return the op that multiplies with such weights, given them; it takes `x`, `weights` and `ids`."""
    if any(isinstance(stack.first, IntWeight) and stack.first.order is not None for stack in (w13, w2)):
        raise UnsupportedModelError(f"{prefix}: activation order (desc_act) is not supported for experts")
    match w13.first, w2.first:
        case IntWeight() as up, IntWeight() as down if (up.bits, up.group_size) == (down.bits, down.group_size):
            return partial(
                ops.fused_moe_wna16,
                w13=w13.whole(up.words),
                w2=w2.whole(down.words),
                w13_scales=w13.whole(up.scales),
                w2_scales=w2.whole(down.scales),
                w13_zeros=None if up.zeros is None else w13.whole(up.zeros),
                w2_zeros=None if down.zeros is None else w2.whole(down.zeros),
                bits=up.bits,
                group_size=up.group_size,
            )
        case (Fp8Weight() as up, Fp8Weight() as down):
            return partial(
                ops.fused_moe,
                w13=w13.whole(up.codes),
                w2=w2.whole(down.codes),
                w13_scale=w13.whole(up.scale),
                w2_scale=w2.whole(down.scale),
            )
        case DenseWeight() as up, DenseWeight() as down:
            return partial(ops.fused_moe, w13=w13.whole(up.weight), w2=w2.whole(down.weight))
        case up, down:
            raise UnsupportedModelError(
                f"{prefix}: {_form(up)} for gate and up projections, {_form(down)} for down projections; "
                "an op takes experts of one form only"
            )


def _tiled(w13: _Stack, w2: _Stack, runtime: ModelRuntime) -> TiledExperts | None:
    """Return what multiplies with such weights in C++, in their memory; None where C++ does not."""
    ops, library = runtime.ops, runtime.ops.library
    if library is None:
        return None

    def ints(stack: _Stack, weight: IntWeight) -> TiledWeight:
        zeros = None if weight.zeros is None else stack.whole(weight.zeros)
        words, scales = stack.whole(weight.words), stack.whole(weight.scales)
        return TiledWeight(library, words, scales, zeros, bits=weight.bits, group_size=weight.group_size)

    match w13.first, w2.first:
        case IntWeight() as up, IntWeight() as down if ops.backends["fused_moe_wna16"] == "cpp":
            if not TiledWeight.takes(up.scales, bits=up.bits, group_size=up.group_size):
                return None
            return TiledExperts(library, ints(w13, up), ints(w2, down), num_experts=w13.num_experts)
        case DenseWeight() as up, DenseWeight() as down if ops.backends["fused_moe"] == "cpp":
            matrices = (TiledMatrix(library, stack.whole(part.weight)) for stack, part in ((w13, up), (w2, down)))
            return TiledExperts(library, *matrices, num_experts=w13.num_experts)
    return None


def _interleaved(w13: _Stack, w2: _Stack, product: Callable[..., Tensor], ops: Ops) -> Callable[..., Tensor]:
    """Put packed weights into the order in which Triton multiplies them, if it does, and return `product` of them.

    Weights whose inputs cannot be interleaved are left as they are, and multiplied more slowly.
    """
    match w13.first, w2.first:
        case IntWeight() as up, IntWeight() as down if ops.backends["fused_moe_wna16"] == "triton":
            stacks = w13.whole(up.words), w2.whole(down.words)
            if not any(words.shape[1] % WNA16_INTERLEAVE for words in stacks):
                for words in (words for stack in stacks for words in stack):
                    interleave_rows_(words, up.bits, WNA16_INTERLEAVE)
                return partial(product, interleave=WNA16_INTERLEAVE)
    return product


def _form(weight: LinearWeight) -> str:
    match weight:
        case IntWeight():
            return f"{weight.bits} bits in groups of {weight.group_size}"
        case Fp8Weight():
            return "e4m3"
        case _:
            return "full precision"
