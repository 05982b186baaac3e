"""The characters that stand for bytes in byte-level tokenizers."""

from collections.abc import Mapping


def byte_alphabet() -> Mapping[str, int]:
    """Return GPT-2's spelling of bytes as characters: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
