"""A digest for comparing the models of two hosts without reading all of their files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from scalellm.services.common.gguf_metadata import GgufError
from scalellm.services.common.gguf_parts import gguf_parts
from scalellm.services.common.lifecycle import StartError
from scalellm.services.executor.model_config.errors import UnsupportedModelError
from scalellm.services.executor.model_config.files import locate

_PIECES = 64
_PIECE_BYTES = 4096


def model_digest(path: Path) -> str:
    """Return 16 hexadecimal digits of the files that a model is loaded from. Raises StartError.

    The digest covers each file's size and 64 pieces of 4 KiB, the beginning and the end among them. It detects other
    weights, another quantisation or an incomplete copy, but not a single wrong byte within a tensor.
    """
    try:
        located = locate(path)
        if located.is_dir():
            files = [located / "config.json", *sorted(located.glob("*.safetensors"))]
        else:
            files = gguf_parts(located)
        digest = hashlib.sha256()
        for file in files:
            digest.update(_digest_of_file(file))
    except (UnsupportedModelError, GgufError) as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def _digest_of_file(path: Path) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        last = max(0, size - _PIECE_BYTES)
        for number in range(_PIECES):
            digest.update(os.pread(file.fileno(), _PIECE_BYTES, last * number // (_PIECES - 1)))
    return digest.digest()
