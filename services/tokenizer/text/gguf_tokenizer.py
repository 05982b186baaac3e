"""Build a `tokenizers.Tokenizer` from the metadata of a GGUF file.

Two families cover the supported models: `gpt2`, byte-level BPE with merges in the file, and `llama`, SentencePiece BPE
with scores and byte fallback (Llama 2, Mistral, Gemma). The latter is rebuilt as the merge list that its vocabulary
implies, which is how these models' own tokenizer.json files were made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from scalellm.services.common.end_tokens import GGUF_CONTROL, drawable
from scalellm.services.common.gguf_metadata import GgufMetadata
from scalellm.services.common.model_files import shown
from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError, from_library
from scalellm.services.tokenizer.text.pre_tokenizers import PRE_TOKENIZERS

_NORMAL, _USER_DEFINED = 1, 4
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_MOST_CHARS = 1024
_SPACE = "▁"
"""SentencePiece's visible space, U+2581."""


def build_gguf_tokenizer(metadata: GgufMetadata, roles: Mapping[str, int], path: Path) -> Tokenizer:
    """Build the tokenizer that the file `path` describes in `metadata`, whose tokens with a role are `token_roles`.

    Raises UnsupportedTokenizerError.
    """
    family = metadata.typed("tokenizer.ggml.model", str)
    tokens = metadata.array("tokenizer.ggml.tokens", str)
    if family is None or tokens is None:
        raise UnsupportedTokenizerError(f"{path} carries no tokenizer")
    longest = max(map(len, tokens), default=0)
    if longest > _MOST_CHARS:
        raise UnsupportedTokenizerError(
            f"{path}: tokenizer.ggml.tokens has a token of {longest} characters; at most {_MOST_CHARS} are supported"
        )
    if family == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata, tokens, path), _pre_tokenizer(metadata, path).adds_bos
    elif family == "llama":
        tokens = _visible_spaces(tokens)
        tokenizer, adds_bos = _sentence_piece(metadata, tokens, roles, path), True
    else:
        raise UnsupportedTokenizerError(
            f"{path} has a tokenizer of type {shown(family)}; "
            "supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
        )
    types = _types(metadata, len(tokens), path)
    _add_special_tokens(tokenizer, tokens, types)
    _add_boundary_tokens(tokenizer, metadata, tokens, adds_bos, roles)
    return tokenizer


def token_roles(metadata: GgufMetadata, path: Path) -> dict[str, int]:
    """Return the ids that the file gives to roles, by the names that chat templates use (`bos_token`, ...).

    One that is no token's is left out, with a warning.
    """
    num_tokens = len(metadata.array("tokenizer.ggml.tokens", str) or ())
    given = {role: f"tokenizer.ggml.{key}" for role, key in _ROLES.items() if f"tokenizer.ggml.{key}" in metadata}
    ids = {role: drawable(f"{path}: {key}", metadata[key], num_tokens) for role, key in given.items()}
    return {role: token_id for role, token_id in ids.items() if token_id is not None}


def _pre_tokenizer(metadata: GgufMetadata, path: Path) -> Any:
    name = metadata.typed("tokenizer.ggml.pre", str) or "default"
    if name not in PRE_TOKENIZERS:
        supported = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedTokenizerError(f"{path} splits text by the rule {shown(name)}; supported are {supported}")
    return PRE_TOKENIZERS[name]


def _byte_level(metadata: GgufMetadata, tokens: Sequence[str], path: Path) -> Tokenizer:
    lines = metadata.array("tokenizer.ggml.merges", str)
    if lines is None:
        raise UnsupportedTokenizerError(f"{path} has a byte-level BPE vocabulary but no merges")
    # Pieces are written in the byte alphabet, which has no space.
    merges = [tuple(merge.split(" ")) for merge in lines]
    rule = _pre_tokenizer(metadata, path)
    tokenizer = _bpe(tokens, merges, path, ignore_merges=rule.ignore_merges)
    normalizer = rule.build_normalizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = rule.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: GgufMetadata, tokens: Sequence[str], roles: Mapping[str, int], path: Path) -> Tokenizer:
    scores = metadata.array("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(tokens):
        raise UnsupportedTokenizerError(f"{path} has a SentencePiece vocabulary without a score per token")
    tokenizer = _bpe(
        tokens,
        _implied_merges(tokens, scores, _types(metadata, len(tokens), path)),
        path,
        unk_token=tokens[roles["unk_token"]] if "unk_token" in roles else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    visible = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.typed("tokenizer.ggml.add_space_prefix", bool) is not False:
        # As Llama 2's and Mistral's own files have it: a space before the text and before what follows a special token.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), visible])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = visible
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _implied_merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece vocabulary, first to apply first.

    SentencePiece joins the neighbours whose union has the best score. So every way to cut a token into two tokens is a
    merge, a token's score is its rank, and of its cuts the one with the longest left part comes first. Only normal
    tokens have a meaningful score: writers fill in a constant for the others, which rank with the normal token that
    follows them.
    """
    ranks = [0.0] * len(tokens)
    rank = -min(scores, default=0.0)
    for token_id in reversed(range(len(tokens))):
        if types[token_id] == _NORMAL:
            rank = -scores[token_id]
        ranks[token_id] = rank
    vocabulary = set(tokens)
    merges: list[tuple[str, str]] = []
    for token_id in sorted(range(len(tokens)), key=ranks.__getitem__):
        token = tokens[token_id]
        for cut in range(len(token) - 1, 0, -1):
            left = token[:cut]
            if left in vocabulary and (right := token[cut:]) in vocabulary:
                merges.append((left, right))
    return merges


def _visible_spaces(tokens: Sequence[str]) -> list[str]:
    """Return tokens as SentencePiece spells them: runs of spaces are stored as such, all others with U+2581."""
    return [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]


def _bpe(tokens: Sequence[str], merges: list[Any], path: Path, **options: Any) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UnsupportedTokenizerError(f"{path} lists a token twice")
    return from_library(
        lambda: Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options)),
        f"{path} has merges that do not fit its vocabulary",
    )


def _types(metadata: GgufMetadata, num_tokens: int, path: Path) -> list[int]:
    types = metadata.array("tokenizer.ggml.token_type", int) or [_NORMAL] * num_tokens
    if len(types) != num_tokens:
        raise UnsupportedTokenizerError(f"{path} has {num_tokens} tokens but {len(types)} token types")
    return types


def _add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Mark control tokens as special, and those the vocabulary's author added by hand as unsplittable text."""
    marked = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (GGUF_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == GGUF_CONTROL) for token, kind in marked])


def _add_boundary_tokens(
    tokenizer: Tokenizer, metadata: GgufMetadata, tokens: Sequence[str], adds_bos: bool, roles: Mapping[str, int]
) -> None:
    """Put the beginning and end tokens around a text where the model wants them."""
    bos, eos = roles.get("bos_token"), roles.get("eos_token")
    pieces = ["$A"]
    special: list[tuple[str, int]] = []
    says_bos, says_eos = (metadata.typed(f"tokenizer.ggml.add_{name}_token", bool) for name in ("bos", "eos"))
    if bos is not None and (adds_bos if says_bos is None else says_bos):
        pieces.insert(0, tokens[bos])
        special.append((tokens[bos], bos))
    if eos is not None and says_eos:
        pieces.append(tokens[eos])
        special.append((tokens[eos], eos))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)
