"""Splitting of text before merging in byte-level BPE, by the name a GGUF file gives in `tokenizer.ggml.pre`.

A GGUF file carries vocabulary and merges but only the *name* of the splitting rule, so each rule is stated here as the
model's own tokenizer.json states it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, normalizers, pre_tokenizers

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

KNOWN_PATTERNS = frozenset((_LLAMA3, _QWEN2, _TEKKEN))
"""Patterns whose time grows in proportion to the length of any text."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One splitting rule.

    Attributes:
        pattern: Pattern of the pieces of text; None for GPT-2's own pattern, which is built into `ByteLevel`.
        single_digits: Cut out every digit first.
        nfc: Bring the text to Unicode normal form C first.
        ignore_merges: A piece that is a token as a whole is that token, whatever the merges say.
        adds_bos: True if a prompt starts with the beginning-of-sequence token when the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return the rule as a component of `tokenizers`."""
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        return pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level

    def build_normalizer(self) -> normalizers.Normalizer | None:
        """Return what happens to the text before it is split."""
        return normalizers.NFC() if self.nfc else None


_GPT2_RULE = PreTokenizer()
_LLAMA3_RULE = PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True)
_QWEN2_RULE = PreTokenizer(_QWEN2, nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "default": _GPT2_RULE,  # what files from before the name existed say
        "gpt-2": _GPT2_RULE,
        "smollm": PreTokenizer(single_digits=True),
        "llama-bpe": _LLAMA3_RULE,
        "llama-v3": _LLAMA3_RULE,
        "llama3": _LLAMA3_RULE,
        "qwen2": _QWEN2_RULE,
        "deepseek-r1-qwen": _QWEN2_RULE,
        "tekken": PreTokenizer(_TEKKEN, ignore_merges=True, adds_bos=True),
    }
)
