"""Lines that tests leave for the end: they are printed when all tests are done."""

from __future__ import annotations

import pytest

_SECTIONS = pytest.StashKey[dict[str, list[str]]]()


def lines_at_end(config: pytest.Config, title: str) -> list[str]:
    """Return the list whose lines are printed at the end under a title."""
    return config.stash.setdefault(_SECTIONS, {}).setdefault(title, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print all sections that have lines; the hook is that of tests/conftest.py."""
    for title, lines in terminalreporter.config.stash.get(_SECTIONS, {}).items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
