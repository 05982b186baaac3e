"""Weights from a GGUF file, dequantised on the way in."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from services.executor.models.config import ModelConfig
from services.executor.models.layers import WeightSlot
from services.executor.weights.gguf_file import GgufFile

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
_GEMMA3_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<tensor>\w+)\.(?P<kind>weight|bias)")
_ROTATED = re.compile(r"self_attn\.[qk]_proj\.(weight|bias)$")


class GgufSource:
    """An open GGUF file as a checkpoint of the model `config` describes."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._config = config
        self._interleaved = file.metadata["general.architecture"] == "llama"
        self._native = {self._hugging_face_name(name): name for name in file.tensors}
        self._shapes = {name: file.tensors[native].shape for name, native in self._native.items()}
        # One row of each type tells whether it can be read, before anything large is allocated.
        for name in {tensor.type: name for name, tensor in file.tensors.items()}.values():
            file.dequantize(name, 0, 1)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the file."""
        return self._shapes

    def native_name(self, name: str) -> str:
        """Return GGUF's name for a tensor."""
        return self._native.get(name, name)

    def read(self, slot: WeightSlot, on_bytes: Callable[[int], None]) -> None:
        """Fill a slot, converting to its dtype a few rows at a time."""
        name = self._native[slot.name]
        dest = self._stored_order(slot)
        # Rows of the file per index of `dest`, whose first dimension may be heads instead of rows.
        rows = slot.dest.shape[0] // dest.shape[0]
        step = max(1, self._file.rows_per_step(name) // rows)
        for start in range(0, dest.shape[0], step):
            part = dest[start : start + step]
            values = torch.from_numpy(self._file.dequantize(name, start * rows, part.shape[0] * rows))
            if self._config.is_gemma and slot.name.endswith("norm.weight"):
                values -= 1.0  # the file has Gemma's norms as 1 + w
            part.copy_(values.reshape(part.shape))
            on_bytes(part.nbytes)

    def _stored_order(self, slot: WeightSlot) -> Tensor:
        """Return a view of the slot's memory whose elements come in the order of the file.

        The `llama` architecture rotates neighbours (x0, x1), where Hugging Face and these kernels rotate halves
        (x0, x[D/2]); its converter reorders the rows of q and k accordingly, which this undoes.
        """
        if not (self._interleaved and _ROTATED.search(slot.name)):
            return slot.dest
        return torch.unflatten(slot.dest, 0, (-1, 2, self._config.head_dim // 2)).transpose(1, 2)

    def _hugging_face_name(self, name: str) -> str:
        match = _NAME.fullmatch(name)
        if match is None:
            return name
        layer, tensor, kind = match["layer"], match["tensor"], match["kind"]
        if layer is None:
            return f"{_TOP_LEVEL[tensor]}.{kind}" if tensor in _TOP_LEVEL else name
        table = _GEMMA3_LAYER if self._config.is_gemma else _LAYER
        return f"model.layers.{int(layer)}.{table[tensor]}.{kind}" if tensor in table else name
