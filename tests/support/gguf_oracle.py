"""Models of GGUF files as transformers loads them, without what makes that take half a minute."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


class _VocabularySkippingReader(gguf.GGUFReader):  # type: ignore[misc]
    """The gguf package's reader without the vocabulary, of which it makes an object per entry."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        size, parts, data, types = orig_offs, [], [], [gguf.GGUFValueType(raw_type)]
        if types[0] != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = gguf.GGUFValueType(int.from_bytes(self.data[orig_offs : orig_offs + 4].tobytes(), "little"))
        length = int.from_bytes(self.data[orig_offs + 4 : orig_offs + 12].tobytes(), "little")
        size = orig_offs + 12
        if item != gguf.GGUFValueType.STRING:
            size += length * self.gguf_scalar_to_np[item]().nbytes
        else:
            for _ in range(length):
                size += 8 + int.from_bytes(self.data[size : size + 8].tobytes(), "little")
        return size - orig_offs, parts, data, types


def load_gguf_oracle(path: Path, vocab_size: int) -> PreTrainedModel:
    """Return transformers' model of a GGUF file, in float32.

    Args:
        path: A folder with `model.gguf`, or the file.
        vocab_size: Rows of the embedding; transformers counts the vocabulary, which is not read here.
    """
    file = path / "model.gguf" if path.is_dir() else path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", _VocabularySkippingReader)
        # transformers builds this table anew for each of its 400 modules.
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        settings = load_gguf_checkpoint(str(file))["config"]
        config = AutoConfig.for_model(**{**settings, "vocab_size": vocab_size})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    assert model.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # tied
    return model
