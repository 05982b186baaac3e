"""Weights from a GGUF file, dequantised on the way in."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from scalellm.services.executor.gguf_file import GgufFile, GgufTensor
from scalellm.services.executor.model_config.config import ModelConfig
from scalellm.services.executor.models.weight_slot import WeightSlot

_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL_LAYER = _LAYER | {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN3_MOE_LAYER = _LAYER | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_GEMMA3_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS: Mapping[str, Mapping[str, str]] = {
    "MixtralForCausalLM": _MIXTRAL_LAYER,
    "Qwen3MoeForCausalLM": _QWEN3_MOE_LAYER,
    "Gemma3ForCausalLM": _GEMMA3_LAYER,
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<tensor>\w+)(?:\.(?P<expert>\d+))?\.(?P<kind>weight|bias)")
_ROTATED = re.compile(r"self_attn\.[qk]_proj\.(weight|bias)$")


class _Stored(NamedTuple):
    """A tensor of the model in the file, where the matrices of all experts may lie in one tensor."""

    name: str
    first_row: int
    shape: tuple[int, ...]


class GgufSource:
    """An open GGUF file as a checkpoint of the model `config` describes."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._config = config
        self._interleaved = file.metadata["general.architecture"] == "llama"
        self._layer_names = _LAYERS.get(config.architecture, _LAYER)
        self._stored = dict(part for name, tensor in file.tensors.items() for part in self._parts(name, tensor))
        self._shapes = {name: stored.shape for name, stored in self._stored.items()}
        # One row of each type tells whether it can be read, before anything large is allocated.
        for name in {tensor.type: name for name, tensor in file.tensors.items()}.values():
            file.dequantize(name, 0, 1)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the file."""
        return self._shapes

    @property
    def types(self) -> Mapping[str, str]:
        """GGUF's name of the type of every tensor in the file."""
        return {name: self._file.tensors[stored.name].type.name for name, stored in self._stored.items()}

    def native_name(self, name: str) -> str:
        """Return GGUF's name for a tensor."""
        return self._stored[name].name if name in self._stored else name

    def wrong_dtype(self, name: str, slot: WeightSlot) -> str | None:
        """Return None: any type that can be dequantised is right, and blocks are requested only where they can
        be kept.
        """
        return None

    def read(self, name: str, slot: WeightSlot, device: torch.device, on_bytes: Callable[[int], None]) -> None:
        """Fill a slot: with values, converted a few rows at a time, or as one matrix where it needs that."""
        if slot.is_plain:
            self._read_values(name, slot.dest, slot.window, on_bytes)
            return
        native, first_row, shape = self._stored[name]
        rows_read, columns = _split(slot.window)
        if rows_read is not None:
            first_row += rows_read.start
        if torch.uint8 in slot.dtypes:
            count = shape[0] if rows_read is None else rows_read.stop - rows_read.start
            rows = torch.from_numpy(self._file.raw_rows(native, first_row, count, columns))
            matrix = torch.empty_like(rows)
            ordered = self._in_stored_order(name, matrix)
            ordered.copy_(rows.view(ordered.shape))
        else:
            matrix = torch.empty(slot.shape)
            self._read_values(name, matrix, slot.window, lambda _: None)
        slot.load(matrix, device)
        on_bytes(slot.num_bytes)

    def _read_values(
        self, name: str, dest: Tensor, window: tuple[slice, ...] | None, on_bytes: Callable[[int], None]
    ) -> None:
        native, first_row, _ = self._stored[name]
        rows_read, columns = _split(window)
        if rows_read is not None:
            first_row += rows_read.start
        ordered = self._in_stored_order(name, dest)
        # Rows of the file per index of `ordered`, whose first dimension may be heads instead of rows.
        rows = dest.shape[0] // ordered.shape[0]
        step = max(1, self._file.rows_per_step(native) // rows)
        for start in range(0, ordered.shape[0], step):
            part = ordered[start : start + step]
            values = torch.from_numpy(
                self._file.dequantize(native, first_row + start * rows, len(part) * rows, columns)
            )
            if self._config.is_gemma and name.endswith("norm.weight"):
                values -= 1.0  # the file has Gemma's norms as 1 + w
            part.copy_(values.reshape(part.shape))
            on_bytes(part.nbytes)

    def _in_stored_order(self, name: str, rows: Tensor) -> Tensor:
        """Return a view of a matrix or vector whose elements come in the order of the file.

        The `llama` architecture rotates neighbours (x0, x1), where Hugging Face and these kernels rotate halves
        (x0, x[D/2]); its converter reorders the rows of q and k accordingly, which this undoes.
        """
        if not (self._interleaved and _ROTATED.search(name)):
            return rows
        return torch.unflatten(rows, 0, (-1, 2, self._config.head_dim // 2)).transpose(1, 2)

    def _parts(self, name: str, tensor: GgufTensor) -> Iterator[tuple[str, _Stored]]:
        """Yield what a tensor of the file holds, by Hugging Face names: itself, or the matrix of each expert."""
        match = _NAME.fullmatch(name)
        layer, part, expert = match.group("layer", "tensor", "expert") if match else (None, name, None)
        names = _TOP_LEVEL if layer is None else self._layer_names
        known = names.get(part if expert is None else f"{part}_exps")  # older files: a tensor for each expert
        if match is None or known is None:
            yield name, _Stored(name, 0, tensor.shape)
            return
        prefix = "" if layer is None else f"model.layers.{int(layer)}."
        stacked = "{}" in known and expert is None
        shape = tensor.shape[1:] if stacked else tensor.shape
        for index in range(tensor.shape[0] if stacked else 1):
            hugging_face_name = f"{prefix}{known.format(index if stacked else expert)}.{match['kind']}"
            yield hugging_face_name, _Stored(name, index * math.prod(shape[:-1]), shape)


def _split(window: tuple[slice, ...] | None) -> tuple[slice | None, slice | None]:
    """Return the ranges of rows and of columns of a window."""
    if window is None:
        return None, None
    rows, *columns = window
    return rows, columns[0] if columns else None
