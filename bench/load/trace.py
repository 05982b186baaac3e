"""Requests of a recorded trace, in the format that Mooncake publishes its own in.

One JSON object per line: `timestamp` in milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`, one
number per 512 tokens of the prompt: prompts share the blocks whose numbers they share.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from bench.load.workload import Conversation, Turn

BLOCK_TOKENS = 512
"""Tokens of a prompt for each of its hash ids."""


def read_trace(
    path: Path, alphabet: Sequence[int], *, max_len: int, max_requests: int | None = None
) -> tuple[list[Conversation], list[float]]:
    """Read a trace: what is sent, and when, in seconds after the first request.

    Args:
        path: The file.
        alphabet: Token ids that prompts are made of; the same block has the same tokens everywhere.
        max_len: Prompts are cut where prompt and answer together are longer.
        max_requests: Read no more than so many.

    Raises ValueError, which names the line and the field at fault.
    """
    rows: list[tuple[float, int, int, list[int]]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if max_requests is not None and len(rows) == max_requests:
                break
            if line.strip():
                rows.append(_read_line(path, number, line))
    if not rows:
        raise ValueError(f"{path}: there is no request in it")
    rows.sort(key=lambda row: row[0])
    begin = rows[0][0]
    conversations = []
    for number, (_, input_len, output_len, blocks) in enumerate(rows):
        output_len = min(output_len, max_len - 1)
        tokens = [token for block in blocks for token in _block(block, alphabet)]
        if len(tokens) < input_len:  # what no block stands for is nobody else's
            tokens += random.Random(f"{path.name} {number}").choices(alphabet, k=input_len - len(tokens))
        prompt = tuple(tokens[: min(input_len, max_len - output_len)])
        conversations.append(Conversation(number, (Turn(prompt, output_len),)))
    return conversations, [(row[0] - begin) / 1e3 for row in rows]


def _read_line(path: Path, number: int, line: str) -> tuple[float, int, int, list[int]]:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is no object")
    for name, least in (("timestamp", 0), ("input_length", 1), ("output_length", 1)):
        value = row.get(name)
        if not isinstance(value, int | float) or value < least:
            raise ValueError(f"{where}: {name} must be a number of at least {least}, got {value!r}")
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
        raise ValueError(f"{where}: hash_ids must be a list of integers")
    return float(row["timestamp"]), int(row["input_length"]), int(row["output_length"]), blocks


def _block(block: int, alphabet: Sequence[int]) -> list[int]:
    return random.Random(block).choices(alphabet, k=BLOCK_TOKENS)
