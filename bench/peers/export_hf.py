"""`python -m bench.peers.export_hf GGUF FOLDER DTYPE`: a model as safetensors with its tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from scalellm.services.tokenizer.text.loading import load_model_tokenizer

# What transformers takes by these names; templates may use others, which are text of the template there.
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def export(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder; values are those of the source, dequantised and rounded to `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    folder.mkdir(exist_ok=True)
    # Not save_pretrained: it takes a model that came from GGUF for a quantised one, which it refuses to write.
    values = {name: value.to(dtype) for name, value in model.named_parameters()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    ours = load_model_tokenizer(source)
    config = model.config
    config.dtype = dtype
    # Without an end token: answers are as long as they are asked for, on servers that know no other way as well.
    config.architectures, config.eos_token_id = [type(model).__name__], None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    roles = {name: token for name, token in ours.special_tokens.items() if name in _ROLES}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=ours.tokenizer, **roles)
    tokenizer.chat_template = ours.chat_template
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3]))
