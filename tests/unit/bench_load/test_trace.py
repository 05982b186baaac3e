"""Traces in Mooncake's format."""

import json

import pytest

from bench.load.trace import BLOCK_TOKENS, read_trace

ALPHABET = range(256, 2048)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(timestamp, input_length, output_length, hash_ids):
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": hash_ids,
    }


def test_prompts_share_the_blocks_that_the_trace_says(tmp_path):
    path = write(
        tmp_path / "t.jsonl", row(3000, 1300, 5, [7, 8, 9]), row(1000, 1100, 9, [7, 8, 10]), row(4500, 600, 1, [])
    )
    planned, times = read_trace(path, ALPHABET, max_len=10_000)
    first, second, third = (conversation.turns[0] for conversation in planned)
    assert times == [0.0, 2.0, 3.5]
    assert [len(turn.token_ids) for turn in (first, second, third)] == [1100, 1300, 600]
    assert [turn.output_len for turn in (first, second, third)] == [9, 5, 1]
    assert first.token_ids[: 2 * BLOCK_TOKENS] == second.token_ids[: 2 * BLOCK_TOKENS]
    assert first.token_ids[2 * BLOCK_TOKENS :] != second.token_ids[2 * BLOCK_TOKENS : 1100]
    assert third.token_ids[:BLOCK_TOKENS] not in (first.token_ids[:BLOCK_TOKENS], second.token_ids[:BLOCK_TOKENS])
    assert read_trace(path, ALPHABET, max_len=10_000) == (planned, times)


def test_what_is_too_long_is_cut(tmp_path):
    path = write(tmp_path / "t.jsonl", row(0, 5000, 300, list(range(10))), row(1, 100, 5000, [1]), row(2, 9, 9, [1]))
    planned, _ = read_trace(path, ALPHABET, max_len=1000, max_requests=2)
    assert [(len(c.turns[0].token_ids), c.turns[0].output_len) for c in planned] == [(700, 300), (1, 999)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2"),
        ("[]", "no object"),
        (json.dumps(row(-1, 1, 1, [])), "timestamp"),
        (json.dumps(row(0, 0, 1, [])), "input_length"),
        (json.dumps(row(0, 1, "x", [])), "output_length"),
        (json.dumps(row(0, 1, 1, ["x"])), "hash_ids"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path, line, problem):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row(0, 1, 1, [])) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=problem):
        read_trace(path, ALPHABET, max_len=100)


def test_an_empty_trace_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no request"):
        read_trace(write(tmp_path / "t.jsonl"), ALPHABET, max_len=100)
