"""Docstrings name their subject: none opens with an indirect question, such as "What a call can fail with", or with a
pronoun, such as "It ends calls".

No question opens the description of an argument or attribute either, nor the help of an option.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
INDIRECT = re.compile(r"(What|Whether|How|When|Where|Which|Who|Whom|Whose|Why|Of|By what|By which)\b")
"""Openings of questions, and of an answer whose question is the name ("Of a table.")."""

PRONOUN = re.compile(r"(It|Its|They|Their|These|Those)\b")
"""Openings that leave the subject out. An argument may have them: "Its name" is that of what the docstring is about."""

GENERATED = "scalellm/v1/"


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, of attributes and constants as well."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        after_value = True  # a docstring stands first, or behind an assignment
        for statement in node.body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if after_value and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.strip()
            after_value = isinstance(statement, ast.Assign | ast.AnnAssign)


def helps(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each argument `help` of a call: what `--help` prints of an option."""
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.keyword) and node.arg == "help" else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value


def riddles_of(docstring: str) -> list[str]:
    """The riddles in a docstring: its opening, and what it says of arguments and attributes."""
    opening, *lines = docstring.splitlines()
    entries = [entry[1] for line in lines if (entry := re.match(r" +\w+: (.+)", line)) is not None]
    questions = [text for text in (opening, *entries) if INDIRECT.match(text)]
    return questions + [opening] * (PRONOUN.match(opening) is not None)


@pytest.mark.parametrize("folder", ["services", "kernels", "clients", "bench", "scripts", "tests", "examples"])
def test_docstrings_name_their_subject(folder: str) -> None:
    listed = subprocess.run(["git", "ls-files", f"{folder}/*.py"], cwd=ROOT, check=True, capture_output=True, text=True)
    names = [name for name in listed.stdout.splitlines() if GENERATED not in name and (ROOT / name).is_file()]
    assert names
    riddles = [
        f"{name}:{line}: {riddle}"
        for name in names
        for tree in [ast.parse((ROOT / name).read_text(encoding="utf-8"))]
        for line, text in (*docstrings(tree), *helps(tree))
        for riddle in riddles_of(text)
    ]
    assert riddles == []


@pytest.mark.parametrize(
    ("source", "riddles"),
    [
        ('"""What a call can fail with."""', 1),
        ('"""Errors of a call."""', 0),
        ('def f() -> bool:\n    """Whether it is."""', 1),
        ('"""They end calls."""', 1),
        ('limit = 1\n"""How many there may be."""', 1),
        ('limit = 1\n"""Whatever comes first wins."""', 0),
        ('"""Ends calls.\n\n    Args:\n        call: Which.\n        limit: Of calls.\n    """', 2),
        ('print(1)\n"""What is no docstring."""', 0),
    ],
)
def test_the_rule_itself(source: str, riddles: int) -> None:
    assert sum(len(riddles_of(text)) for _, text in docstrings(ast.parse(source))) == riddles
