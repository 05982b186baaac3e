"""Load the tokenizer of a model: Hugging Face directory or GGUF file."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.common.gguf_metadata import GgufError, GgufMetadata
from services.common.tokenizer_digest import (
    TOKENIZER_JSON,
    TokenizerSourceError,
    gguf_tokenizer_sha256,
    tokenizer_sha256,
    tokenizer_source,
)
from services.tokenizer.text.gguf_tokenizer import build_gguf_tokenizer
from services.tokenizer.text.model_tokenizer import ModelTokenizer, UnsupportedTokenizerError

_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_GGUF_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_GGUF_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def load_model_tokenizer(model: Path) -> ModelTokenizer:
    """Load the tokenizer of `model`, a model directory or a `.gguf` file.

    A directory's tokenizer.json is preferred over the metadata of its GGUF file. Raises UnsupportedTokenizerError.
    """
    try:
        source = tokenizer_source(model)
        if source.name == TOKENIZER_JSON:
            return _load_directory(model)
        return _load_gguf(source)
    except (TokenizerSourceError, GgufError) as error:
        raise UnsupportedTokenizerError(str(error)) from error


def _load_gguf(path: Path) -> ModelTokenizer:
    metadata = GgufMetadata(path)
    tokenizer = build_gguf_tokenizer(metadata, path)
    prefix = "tokenizer.ggml."
    roles = {name: tokenizer.id_to_token(metadata.get(prefix + key, -1)) for name, key in _gguf_roles(metadata, prefix)}
    templates = {
        key.removeprefix("tokenizer.chat_template").lstrip(".") or "default": metadata[key]
        for key in metadata
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
    }
    return ModelTokenizer(
        tokenizer=tokenizer,
        sha256=gguf_tokenizer_sha256(metadata),
        eos_token_ids=tuple(sorted({metadata[prefix + key] for key in _GGUF_END_TOKENS if prefix + key in metadata})),
        special_tokens={name: token for name, token in roles.items() if token is not None},
        chat_templates=templates,
    )


def _gguf_roles(metadata: GgufMetadata, prefix: str) -> list[tuple[str, str]]:
    return [(name, key) for name, key in _GGUF_ROLES.items() if prefix + key in metadata]


def _load_directory(folder: Path) -> ModelTokenizer:
    path = folder / TOKENIZER_JSON
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UnsupportedTokenizerError(f"{path}: not a tokenizer this version can read: {error}") from error
    # Both would be part of what encoding returns; lengths are the service's business.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = {name: _token_text(config[name]) for name in _TOKEN_ROLES if config.get(name)}
    eos_token_ids = _eos_token_ids(folder)
    if not eos_token_ids and "eos_token" in special_tokens:
        eos_token_id = tokenizer.token_to_id(special_tokens["eos_token"])
        eos_token_ids = set() if eos_token_id is None else {eos_token_id}
    return ModelTokenizer(
        tokenizer=tokenizer,
        sha256=tokenizer_sha256(folder),
        eos_token_ids=tuple(sorted(eos_token_ids)),
        special_tokens=special_tokens,
        chat_templates=_chat_templates(folder, config),
    )


def _eos_token_ids(folder: Path) -> set[int]:
    """Return what generation ends at: the generation settings know more than the model's configuration."""
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        value = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if value is not None:
            return {value} if isinstance(value, int) else set(value)
    return set()


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return templates by name. A template in a file of its own wins over the one in tokenizer_config.json."""
    value = config.get("chat_template") or {}
    if isinstance(value, str):
        templates = {"default": value}
    elif isinstance(value, list):
        templates = {entry["name"]: entry["template"] for entry in value}
    else:
        templates = dict(value)
    legacy = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(legacy, str):
        templates["default"] = legacy
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UnsupportedTokenizerError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedTokenizerError(f"{path}: not a JSON object")
    return value
