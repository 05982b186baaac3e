"""Limits for a tokenizer.json: its ids must fit a table, and its steps must not expand a text without bound.

The library does whatever the file says. An id of four billion would need a table of 32 GB, and two hundred steps that
each double a character would never end, on the first text of a client.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from scalellm.services.common.model_files import shown
from scalellm.services.tokenizer.text.model_tokenizer import UnsupportedTokenizerError

_MOST_TOKENS = 1 << 22
_MOST_GROWTH = 64
"""Largest factor by which normalizing may extend a text. Byte-level steps double it, others rarely change its
length."""


def check_bounds(tokenizer: Tokenizer, path: Path) -> None:
    """Raise UnsupportedTokenizerError for a tokenizer, read from `path`, that exceeds the limits."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary and vocabulary[token] >= _MOST_TOKENS:
        raise UnsupportedTokenizerError(
            f"{path}: the token {shown(token)} has id {vocabulary[token]}; at most {_MOST_TOKENS - 1} is supported"
        )
    growth = 1
    for component in (tokenizer.normalizer, tokenizer.pre_tokenizer):
        if component is not None:
            for step in _steps(json.loads(component.__getstate__())):
                growth *= _growth(step)
    if growth > _MOST_GROWTH:
        raise UnsupportedTokenizerError(
            f"{path}: normalizer and pre_tokenizer make a text up to {shown(growth)} times as long; "
            f"at most {_MOST_GROWTH} times is supported"
        )


def _steps(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the steps of a component, those of sequences one by one."""
    if spec.get("type") == "Sequence":
        for step in spec.get("normalizers") or spec.get("pretokenizers") or ():
            yield from _steps(step)
    else:
        yield spec


def _growth(step: dict[str, Any]) -> int:
    match step.get("type"):
        case "ByteLevel":
            return 2
        case "Replace":
            pattern = step.get("pattern") or {}
            return max(1, -(-len(step.get("content") or "") // max(1, len(pattern.get("String") or ""))))
        case "Prepend":
            return max(1, len(step.get("prepend") or ""))
        case _:
            return 1
