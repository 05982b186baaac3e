"""The source files of a model's tokenizer, and the digest by which two tokenizers are compared.

Text edge and executors exchange token ids, so they must have the same vocabulary. Both sides compute this digest from
the tokenizer's source, without building the tokenizer; if the digests differ, the handshake is refused.
"""

import hashlib
from pathlib import Path

from scalellm.services.common.gguf_metadata import GgufError, GgufMetadata
from scalellm.services.common.gguf_parts import gguf_models

TOKENIZER_JSON = "tokenizer.json"
_GGUF_PREFIX = "tokenizer."
# A chat template does not change what an id means, and quantisations of one model are published with several.
_GGUF_NOT_IDENTITY = "tokenizer.chat_template"


class TokenizerSourceError(Exception):
    """A model has no usable tokenizer; the message is one sentence that names the model and what is missing."""


def tokenizer_source(model: Path) -> Path:
    """Return the file that defines the tokenizer of `model`, a model directory or a `.gguf` file.

    A directory's tokenizer.json comes first, then its only `.gguf` file. Raises TokenizerSourceError.
    """
    if model.is_file():
        return model
    if (model / TOKENIZER_JSON).is_file():
        return model / TOKENIZER_JSON
    files = gguf_models(model)
    if len(files) == 1:
        return files[0]
    if files:
        raise TokenizerSourceError(f"{model} holds {len(files)} .gguf files; pass the path of one of them")
    if (model / "tokenizer.model").is_file():
        raise TokenizerSourceError(
            f"{model} has a tokenizer.model but no {TOKENIZER_JSON}; only the latter is supported: "
            "save the tokenizer with a recent `transformers` to get one"
        )
    raise TokenizerSourceError(f"{model} holds neither a {TOKENIZER_JSON} nor a .gguf file")


def tokenizer_sha256(model: Path) -> bytes:
    """Return the 32-byte digest of the tokenizer of `model`. Raises TokenizerSourceError."""
    source = tokenizer_source(model)
    try:
        if source.name == TOKENIZER_JSON:
            return hashlib.sha256(source.read_bytes()).digest()
        return gguf_tokenizer_sha256(GgufMetadata(source))
    except OSError as error:
        raise TokenizerSourceError(f"{source}: cannot be read: {error.strerror or error}") from error
    except GgufError as error:
        raise TokenizerSourceError(str(error)) from error


def gguf_tokenizer_sha256(metadata: GgufMetadata) -> bytes:
    """Return the digest over a GGUF file's tokenizer entries, whatever their order in the file."""
    digest = hashlib.sha256()
    for key in sorted(metadata):
        if key.startswith(_GGUF_PREFIX) and not key.startswith(_GGUF_NOT_IDENTITY):
            name, value = key.encode("utf-8"), metadata.encoded(key)
            digest.update(len(name).to_bytes(8, "little") + name + len(value).to_bytes(8, "little"))
            digest.update(value)
    return digest.digest()
