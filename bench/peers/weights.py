"""One model's weights in the forms that the systems read, all made from the same GGUF file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np

from bench.peers.gguf_files import add_fields, write_file
from bench.peers.shapes import SHAPES, write_random
from scalellm.services.tokenizer.text.loading import load_model_tokenizer

_CONVERTED = {
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
ROOT = Path(__file__).resolve().parents[2]
"""Folder in which `python -m bench...` is run."""

_DIGEST_LEN = 12
_CHUNK = 2**22


class Weights:
    """The forms of one GGUF file; each is made when it is first asked for and kept.

    Args:
        source: The model's `.gguf` file.
        folder: Folder for the other forms, in a folder of this file's own.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self._parent = folder

    def in_shape(self, shape: str) -> Weights:
        """Random weights in one of SHAPES with the source's tokenizer; their file is alone in its folder."""

        def make(folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            write_random(folder / "model.gguf", SHAPES[shape], f"{shape}, random weights", self.source)

        return Weights(self._made(shape, make) / "model.gguf", self._parent)

    @cached_property
    def sha256(self) -> str:
        """Digest of the source."""
        digest = hashlib.sha256()
        with self.source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def own_form(self) -> str:
        """The type that most of the source's values have, such as Q4_1."""
        counts: dict[str, int] = {}
        for tensor in gguf.GGUFReader(self.source).tensors:
            name = tensor.tensor_type.name
            counts[name] = counts.get(name, 0) + int(tensor.n_elements)
        # A small model has more values in its embedding than in any other tensor, often in a wider type.
        layers = {name: count for name, count in counts.items() if name not in ("F32", "Q8_0", "F16")}
        return max(layers or counts, key=lambda name: counts[name])

    def gguf(self, form: str) -> Path:
        """A GGUF file in `form`: the source's own one, F16 or Q8_0."""
        if form == self.own_form:
            return self.source
        tensor_type, file_type = _CONVERTED[form]
        return self._made(f"{form}.gguf", lambda path: _convert(self.source, path, tensor_type, file_type))

    def hf_folder(self, dtype: str = "float32") -> Path:
        """A folder as `transformers` reads it: safetensors in `dtype`, the source's values dequantised."""
        command = (sys.executable, "-m", "bench.peers.export_hf", str(self.source))
        return self._made(dtype, lambda path: _run([*command, str(path), dtype]))

    def onnx_folder(self, form: str, python: str, version: str) -> Path:
        """A folder as ONNX Runtime GenAI reads it: made by `python` of its environment, where it has this version."""
        command = (python, "-m", "bench.peers.servers.onnx_export", str(self.hf_folder()), form)
        return self._made(f"onnx-{form}-{version}", lambda path: _run([*command, str(path)]))

    def tokenizer_folder(self) -> Path:
        """`tokenizer.json`, and `chat.json` with the chat template, the special tokens and the ids that end answers."""
        return self._made("tokenizer", lambda path: write_tokenizer(self.source, path))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self._parent / self.sha256[:_DIGEST_LEN] / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{name}.partial")
            make(partial)
            partial.replace(path)
        return path


def write_tokenizer(source: Path, folder: Path) -> None:
    """See `Weights.tokenizer_folder`."""
    model = load_model_tokenizer(source)
    folder.mkdir(exist_ok=True)
    model.tokenizer.save(str(folder / "tokenizer.json"))
    chat = {
        "template": model.chat_template,
        "special_tokens": dict(model.special_tokens),
        "eos_token_ids": list(model.eos_token_ids),
    }
    (folder / "chat.json").write_text(json.dumps(chat, indent=2) + "\n")


def _convert(source: Path, target: Path, tensor_type: gguf.GGMLQuantizationType, file_type: gguf.LlamaFileType) -> None:
    """Write all matrices in `tensor_type`, vectors in float32, everything else as it is."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    own = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")
    add_fields(writer, [field for field in reader.fields.values() if field.name not in own])
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor_type if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    write_file(writer)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
