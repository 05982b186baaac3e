"""Models of the presets with random weights, and single steps of them on inputs that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bench.gpu.device import Device
from bench.gpu.roofline import Precision
from scalellm.kernels import (
    Launch,
    Ops,
    SampleOutput,
    decode_workspace,
    num_decode_splits,
    sample_workspace_size,
    select_ops,
)
from scalellm.kernels.spec.case import E4M3, Maker
from scalellm.services.executor.models import (
    PRESETS,
    CausalLM,
    DecodeRows,
    ForwardContext,
    KVCache,
    ModelConfig,
    ModelRuntime,
    PrefillRows,
    Quantization,
    allocate_kv_caches,
)
from scalellm.services.executor.models.dummy import dummy_model

PAGE = 64


@dataclass(frozen=True, slots=True)
class Format:
    """The formats of weights and cache."""

    precision: Precision
    quantization: Quantization
    cache_dtype: torch.dtype

    @property
    def name(self) -> str:
        """The name that tables show."""
        return self.precision + (" + fp8 KV" if self.cache_dtype == E4M3 else "")


FORMATS: Mapping[Precision, Format] = MappingProxyType(
    {
        "bf16": Format("bf16", Quantization(), torch.bfloat16),
        "fp8": Format("fp8", Quantization("fp8"), E4M3),
        "int4": Format("int4", Quantization("int4"), torch.bfloat16),
    }
)


def shortened(name: str, layers: int) -> ModelConfig:
    """Return a preset with fewer layers, for which the same kernels are compiled; experts are an eighth as wide.

    A CPU has to get through it, too, and it unpacks integers anew at every call.
    """
    config = PRESETS[name]
    return replace(
        config,
        num_layers=layers,
        moe_intermediate_size=config.moe_intermediate_size // 8,
        max_position_embeddings=8192,
        sliding_layers=(False,) * layers,
        sparse_layers=(True,) * layers if config.num_experts else (),
    )


def tiny(name: str) -> ModelConfig:
    """Return a preset with its arithmetic and two layers that the interpreter gets through."""
    config = shortened(name, 2)
    return replace(
        config,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64 if config.num_experts else 0,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        attention_scale=64**-0.5,
        max_position_embeddings=1024,
        eos_token_ids=(0,),
    )


def weight_bytes(config: ModelConfig, form: Format) -> int:
    """Return the memory of the weights, without taking it."""
    meta = ModelRuntime(Ops(), torch.bfloat16, torch.device("meta"), form.quantization)
    return CausalLM(config, meta, max_model_len=16).num_bytes()


def make_model(config: ModelConfig, form: Format, device: Device, *, max_model_len: int) -> CausalLM:
    """Return the model on the device, through the ops chosen for it."""
    launch = Launch(device.capability)
    ops = select_ops(device.capability, dtype=torch.bfloat16, kv_cache_dtype=form.cache_dtype, launch=launch)
    runtime = ModelRuntime(ops, torch.bfloat16, device.target, form.quantization)
    return dummy_model(config, runtime, max_model_len=max_model_len)


def copy_to_cpu(model: CausalLM, dtype: torch.dtype, *, max_model_len: int) -> CausalLM:
    """Return a model with the weights that `make_model` draws on the CPU, what is quantised as it is, and ops in
    plain torch. The weights are drawn again, because the model's own may lie in the order in which Triton reads them.
    """
    source = model.runtime
    plain = ModelRuntime(Ops(), source.dtype, source.device, source.quantization)
    drawn = dummy_model(model.config, plain, max_model_len=max_model_len)
    copy = CausalLM(model.config, replace(plain, dtype=dtype, device=torch.device("cpu")), max_model_len=max_model_len)
    for slot, values in zip(copy.weight_slots(), drawn.weight_slots(), strict=True):
        for target, value in zip(slot.dests, values.dests, strict=True):
            target.copy_(value)
    return copy


def random_caches(config: ModelConfig, num_blocks: int, dtype: torch.dtype, make: Maker) -> list[KVCache]:
    """Return caches full of keys and values, as attention over zeros would be no measure."""
    caches = allocate_kv_caches(config, num_blocks, PAGE, dtype=dtype, device=make.device)
    some = make.randn(1024, dtype=dtype)
    for cache in caches:
        for tensor in cache:
            flat = tensor.view(-1)
            whole = flat.numel() // 1024 * 1024
            flat[:whole].view(-1, 1024).copy_(some)
            if dtype != E4M3:
                flat[:whole].view(-1, 1024).mul_(make.rand(whole // 1024, 1, dtype=dtype))
    return caches


class DecodeStep:
    """One new token for each of `rows` sequences with `context` tokens, through the model to the token drawn.

    `live` rows are sequences, the others padding. A sequence has `blocks` blocks of the cache, by default as many as it
    needs.
    """

    def __init__(
        self,
        model: CausalLM,
        caches: list[KVCache],
        rows: int,
        context: int,
        make: Maker,
        *,
        live: int | None = None,
        blocks: int | None = None,
    ) -> None:
        self._model, self._caches = model, caches
        config, launch = model.config, model.runtime.ops.launch
        live = rows if live is None else live
        blocks = blocks or -(-context // PAGE)
        table = torch.arange(rows * blocks, dtype=torch.int32, device=make.device).view(rows, blocks)
        positions = torch.full((rows,), context - 1, device=make.device)
        slots = table[:, (context - 1) // PAGE].long() * PAGE + (context - 1) % PAGE
        lens = torch.full((rows,), context, dtype=torch.int32, device=make.device)
        positions[live:], slots[live:], lens[live:] = 0, -1, 0
        splits = 1 if launch is None else num_decode_splits(launch.capability, config.num_kv_heads)
        workspace = decode_workspace(rows, config.num_heads, config.head_dim, splits, make.device)
        self._context = ForwardContext(positions, slots, DecodeRows(lens, table, splits, workspace), None)
        self.input_ids = make.randint(0, config.vocab_size, rows)
        self.input_ids[live:] = 0
        self.logits = make.poison(rows, config.vocab_size)
        zero = torch.zeros(rows, device=make.device)
        self._sampling = (zero + 1, zero.long(), zero + 1, zero, self.input_ids, positions)
        self._room: dict[str, Any] = {
            "workspace": make.poison(sample_workspace_size(rows, config.vocab_size), dtype=torch.int64),
            "out": SampleOutput(
                make.poison(rows, dtype=torch.int64),
                make.poison(rows),
                torch.empty(rows, 0, dtype=torch.int64, device=make.device),
                torch.empty(rows, 0, device=make.device),
            ),
        }

    def __call__(self) -> Tensor:
        """Queue it; returns `logits`."""
        hidden = self._model.forward(self.input_ids, self._context, self._caches)
        self._model.compute_logits(hidden, out=self.logits)
        self._model.runtime.ops.sample(self.logits, *self._sampling, **self._room)
        return self.logits


class PromptStep:
    """`seqs` prompts of `tokens` tokens each, to the logits of their last ones; `blocks` as for `DecodeStep`."""

    def __init__(
        self,
        model: CausalLM,
        caches: list[KVCache],
        seqs: int,
        tokens: int,
        make: Maker,
        *,
        blocks: int | None = None,
    ) -> None:
        self._model, self._caches = model, caches
        blocks = blocks or -(-tokens // PAGE)
        table = torch.arange(seqs * blocks, dtype=torch.int32, device=make.device).view(seqs, blocks)
        position = torch.arange(tokens, device=make.device)
        slots = table.long()[:, position // PAGE] * PAGE + position % PAGE
        starts = torch.arange(seqs + 1, dtype=torch.int32, device=make.device) * tokens
        lens = torch.full((seqs,), tokens, dtype=torch.int32, device=make.device)
        prefill = PrefillRows(starts, lens, table, tokens)
        self._context = ForwardContext(position.repeat(seqs), slots.flatten(), None, prefill)
        self.input_ids = make.randint(0, model.config.vocab_size, seqs * tokens)
        self._last = starts[1:].long() - 1

    def __call__(self) -> Tensor:
        """Queue it; returns logits [seqs, V]."""
        hidden = self._model.forward(self.input_ids, self._context, self._caches)
        return self._model.compute_logits(hidden[self._last])
