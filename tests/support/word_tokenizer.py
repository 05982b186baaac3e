"""A tokenizer of a hundred words, with the files that models have."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

LETTERS = "abcdefghij"
WORDS = [a + b for a in LETTERS for b in LETTERS]


def write_word_tokenizer(folder: Path) -> Path:
    """Write `tokenizer.json` with a hundred words of letters and some tokens that are none; returns its path."""
    numbered = {word: number for number, word in enumerate([*WORDS, "1", "ü", "a-b"])}
    tokenizer = Tokenizer(models.WordLevel(numbered, "1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def write_chat(folder: Path) -> None:
    """Write `chat.json` beside it."""
    template = "{% for m in messages %}1 {{ m.content }} {% endfor %}1"
    chat = {"template": template, "special_tokens": {}, "eos_token_ids": [0]}
    (folder / "chat.json").write_text(json.dumps(chat))
