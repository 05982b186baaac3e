"""Load the tokenizer of a model: Hugging Face directory or GGUF file."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.common.end_tokens import end_token_ids
from services.common.gguf_metadata import GgufError, GgufMetadata
from services.common.model_files import ModelFileError, read_json_object
from services.common.tokenizer_digest import (
    TOKENIZER_JSON,
    TokenizerSourceError,
    gguf_tokenizer_sha256,
    tokenizer_sha256,
    tokenizer_source,
)
from services.tokenizer.text.gguf_tokenizer import build_gguf_tokenizer, token_roles
from services.tokenizer.text.model_tokenizer import ModelTokenizer, UnsupportedTokenizerError

_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_model_tokenizer(model: Path) -> ModelTokenizer:
    """Load the tokenizer of `model`, a model directory or a `.gguf` file.

    A directory's tokenizer.json is preferred over the metadata of its GGUF file. Raises UnsupportedTokenizerError.
    """
    try:
        source = tokenizer_source(model)
        if source.name == TOKENIZER_JSON:
            return _load_directory(model)
        return _load_gguf(source, end_token_ids(model))
    except (TokenizerSourceError, ModelFileError, GgufError) as error:
        raise UnsupportedTokenizerError(str(error)) from error


def _load_gguf(path: Path, eos_token_ids: tuple[int, ...]) -> ModelTokenizer:
    metadata = GgufMetadata(path)
    roles = token_roles(metadata, path)
    tokenizer = build_gguf_tokenizer(metadata, roles, path)
    templates = {
        key.removeprefix("tokenizer.chat_template").lstrip(".") or "default": metadata[key]
        for key in metadata
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
    }
    return ModelTokenizer(
        tokenizer=tokenizer,
        sha256=gguf_tokenizer_sha256(metadata),
        eos_token_ids=eos_token_ids,
        special_tokens={role: text for role, id_ in roles.items() if (text := tokenizer.id_to_token(id_)) is not None},
        chat_templates=templates,
    )


def _load_directory(folder: Path) -> ModelTokenizer:
    path = folder / TOKENIZER_JSON
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UnsupportedTokenizerError(f"{path}: not a tokenizer this version can read: {error}") from error
    # Both would be part of what encoding returns; lengths are the service's business.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_json_object(folder / "tokenizer_config.json", missing={})
    special_tokens = {name: _token_text(config[name]) for name in _TOKEN_ROLES if config.get(name)}
    return ModelTokenizer(
        tokenizer=tokenizer,
        sha256=tokenizer_sha256(folder),
        eos_token_ids=end_token_ids(folder),
        special_tokens=special_tokens,
        chat_templates=_chat_templates(folder, config),
    )


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return templates by name. A template in a file of its own wins over the one in tokenizer_config.json."""
    value = config.get("chat_template") or {}
    if isinstance(value, str):
        templates = {"default": value}
    elif isinstance(value, list):
        templates = {entry["name"]: entry["template"] for entry in value}
    else:
        templates = dict(value)
    legacy = read_json_object(folder / "chat_template.json", missing={}).get("chat_template")
    if isinstance(legacy, str):
        templates["default"] = legacy
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)
