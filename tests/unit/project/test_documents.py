"""Documents: links, names of files and functions, commands, generated references. `make docs-check` runs this file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from scalellm.cli.main import app

ROOT = Path(__file__).resolve().parents[3]
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]\n]*(?:\n[^\]\n]*)?)\]\(([^)\s]+)\)")
SYMBOL = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)*)`")
FILE_NAME = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|cpp|proto)\b")

BEHAVIOURS = (
    "Who is preempted",
    "How many prompt tokens a step computes",
    "When an answer ends",
    "That a prompt is too long",
    "Which executor gets a request",
    "How a deadline reaches the engine",
    "Where a token becomes text",
    "What a killed executor costs",
    "Where quotas are counted",
    "Which form of a kernel runs",
)
"""Behaviours whose function a reader finds in docs/architecture.md."""


def tracked(pattern: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(name for name in listed if (ROOT / name).exists())


PAGES = tracked("*.md")


def links(page: str) -> Iterator[tuple[str, str]]:
    """Text and target of each link of a page that leads into the repository."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    for label, target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            yield label, target


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return frozenset(found)


@cache
def defined(path: Path) -> frozenset[str]:
    """The names that a module defines: `function`, `Class`, `Class.method`, `CONSTANT`."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for _, target in links(page):
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_functions_that_a_page_links_to_are_in_that_file(page: str) -> None:
    missing = [
        f"{symbol[1]} in {target}"
        for label, target in links(page)
        if target.endswith(".py") and (symbol := SYMBOL.fullmatch(label)) is not None
        if symbol[1] not in defined(((ROOT / page).parent / target).resolve())
    ]
    assert missing == []


def test_files_that_the_architecture_names_exist() -> None:
    everything = [f"/{name}" for pattern in ("*.py", "*.cpp", "*.proto") for name in tracked(pattern)]
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text = LINK.sub("", text)  # the targets of links are relative, and have tests of their own
    names = set(FILE_NAME.findall(text))
    assert len(names) > 20
    assert [name for name in sorted(names) if not any(path.endswith(f"/{name}") for path in everything)] == []
    folders = set(re.findall(r"^\| `([\w/]+)` \|", text, re.MULTILINE))
    assert {"services/tokenizer", "services/scheduler", "services/executor", "kernels", "bench"} <= folders
    assert [name for name in folders if not (ROOT / name).is_dir()] == []


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_architecture_says_where_a_behaviour_is_decided(behaviour: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {re.escape(behaviour)} \|(.*)\|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 1
    functions = [target for label, target in LINK.findall(rows[0][0]) if SYMBOL.fullmatch(label)]
    assert [target for target in functions if target.endswith(".py")]


def test_the_references_match_their_sources() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "reference.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    """`make TARGET`, `scalellm COMMAND` and `python -m MODULE` in code blocks and in code among text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^(?:    |\$ )?(\S.*)$", text, re.MULTILINE)])
    lines = [
        line.split(" #")[0] for line in code.splitlines() if re.match(r"(?:\S*/)?(?:make|scalellm|python3?) ", line)
    ]
    rules = re.findall(r"^([a-z][\w -]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = {name for rule in rules for name in rule.split()}
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    commands = group.commands
    wrong = []
    for line in lines:
        words = line.split()
        program = words[0].rpartition("/")[2]
        if program == "make" and re.fullmatch(r"[a-z][\w-]*", words[1]) and words[1] not in targets:
            wrong.append(line)
        if program == "scalellm" and re.fullmatch(r"[a-z]+", words[1]) and words[1] not in commands:
            wrong.append(line)
        if program.startswith("python") and words[1] == "-m" and not exists(words[2]):
            wrong.append(line)
    assert wrong == []


def exists(module: str) -> bool:
    if "<" in module or not module.startswith(("bench", "scalellm", "services", "kernels", "clients")):
        return True
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
