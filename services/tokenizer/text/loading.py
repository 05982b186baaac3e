"""Load the tokenizer of a model: Hugging Face directory or GGUF file."""

from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from scalellm.services.common.end_tokens import end_token_ids
from scalellm.services.common.gguf_metadata import GgufError, GgufMetadata
from scalellm.services.common.model_files import ModelFileError, brief, read_json_object, shown
from scalellm.services.common.tokenizer_digest import (
    TOKENIZER_JSON,
    TokenizerSourceError,
    gguf_tokenizer_sha256,
    tokenizer_sha256,
    tokenizer_source,
)
from scalellm.services.tokenizer.text.gguf_tokenizer import build_gguf_tokenizer, token_roles
from scalellm.services.tokenizer.text.model_tokenizer import ModelTokenizer, UnsupportedTokenizerError, from_library
from scalellm.services.tokenizer.text.pattern_probe import check_patterns
from scalellm.services.tokenizer.text.tokenizer_bounds import check_bounds

_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_model_tokenizer(model: Path) -> ModelTokenizer:
    """Load the tokenizer of `model`, a model directory or a `.gguf` file.

    A directory's tokenizer.json is preferred over the metadata of its GGUF file. Raises UnsupportedTokenizerError.
    """
    try:
        source = tokenizer_source(model)
        is_directory = source.name == TOKENIZER_JSON
        loaded = _load_directory(model) if is_directory else _load_gguf(source, end_token_ids(model))
        _check_encodes(loaded.tokenizer, source)
        return loaded
    except (TokenizerSourceError, ModelFileError, GgufError) as error:
        raise UnsupportedTokenizerError(str(error)) from error


def _check_encodes(tokenizer: Tokenizer, path: Path) -> None:
    """Check a tokenizer by encoding a text, because the library accepts files with which every call panics."""
    for add_special_tokens in (False, True):
        from_library(
            partial(tokenizer.encode_batch_fast, ["a"], add_special_tokens=add_special_tokens),
            f"{path}: the tokenizer cannot encode a text",
        )


def _load_gguf(path: Path, eos_token_ids: tuple[int, ...]) -> ModelTokenizer:
    metadata = GgufMetadata(path)
    roles = token_roles(metadata, path)
    tokenizer = build_gguf_tokenizer(metadata, roles, path)
    templates = {
        key.removeprefix("tokenizer.chat_template").lstrip(".") or "default": metadata.typed(key, str) or ""
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
    tokenizer = from_library(lambda: Tokenizer.from_file(str(path)), f"{path}: not a tokenizer this version can read")
    check_bounds(tokenizer, path)
    check_patterns(tokenizer, path)
    # Truncation and padding are switched off, because the service checks lengths itself.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_json_object(folder / "tokenizer_config.json", missing={})
    special_tokens = {
        name: text for name in _TOKEN_ROLES if (text := _token_text(folder, name, config.get(name))) is not None
    }
    return ModelTokenizer(
        tokenizer=tokenizer,
        sha256=tokenizer_sha256(folder),
        eos_token_ids=end_token_ids(folder),
        special_tokens=special_tokens,
        chat_templates=_chat_templates(folder, config),
    )


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return templates by name. A template in a file of its own wins over the one in tokenizer_config.json."""
    templates = _named_templates(folder, config.get("chat_template"))
    legacy = read_json_object(folder / "chat_template.json", missing={}).get("chat_template")
    if isinstance(legacy, str):
        templates["default"] = legacy
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _template_file(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _template_file(path)
    return templates


def _named_templates(folder: Path, value: Any) -> dict[str, str]:
    """Return the templates of tokenizer_config.json: one, a list of such with names, or an object of them."""
    if not value:
        return {}
    if isinstance(value, str):
        return {"default": value}
    pairs: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    if not pairs or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise UnsupportedTokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {shown(value)}; it must be a text, or texts by name"
        )
    return dict(pairs)


def _token_text(folder: Path, role: str, value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise UnsupportedTokenizerError(
            f"{folder / 'tokenizer_config.json'}: {role} is {shown(value)}; it must be a token's text"
        )
    return text or None


def _template_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedTokenizerError(f"{path}: cannot be read: {brief(error)}") from error
