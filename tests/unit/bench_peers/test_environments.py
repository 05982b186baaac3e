"""An environment stays once it is installed, is made anew if its packages changed, and is named if it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bench.peers.environments import Environments, PeerError, Recipe, run_logged

RECIPE = Recipe("peer", (("install", "one==1"), ("install", "two==2")))


class FakePip:
    """Makes folders instead of environments; calls end with an error where `failing` is in them."""

    def __init__(self, failing: str = "never") -> None:
        self.commands: list[list[str]] = []
        self._failing = failing

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float) -> None:
        self.commands.append(list(command))
        if self._failing in command:
            raise PeerError("it failed")
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        if "list" in command:
            log.write_text(f"a warning\n{json.dumps([{'name': 'one', 'version': '1'}])}\n")


def test_the_second_time_nothing_is_installed(tmp_path):
    pip = FakePip()
    first = Environments(tmp_path, run=pip).ensure(RECIPE)
    assert [command[-1] for command in pip.commands] == [str(tmp_path / "peer"), "one==1", "two==2", "json"]
    assert first.versions == {"one": "1"}
    again = FakePip("install")
    assert Environments(tmp_path, run=again, may_install=False).ensure(RECIPE) == first
    assert again.commands == []


@pytest.mark.parametrize(
    "changed",
    [Recipe("peer", (("install", "one==2"),)), Recipe("peer", RECIPE.steps, environment={"CMAKE_ARGS": "-D"})],
)
def test_another_recipe_is_installed_anew(tmp_path, changed):
    Environments(tmp_path, run=FakePip()).ensure(RECIPE)
    (tmp_path / "peer" / "left-over").touch()
    with pytest.raises(PeerError, match="--no-install"):
        Environments(tmp_path, run=FakePip(), may_install=False).ensure(changed)
    Environments(tmp_path, run=FakePip()).ensure(changed)
    assert not (tmp_path / "peer" / "left-over").exists()


def test_an_installation_that_failed_is_tried_again(tmp_path):
    with pytest.raises(PeerError, match="it failed"):
        Environments(tmp_path, run=FakePip("two==2")).ensure(RECIPE)
    pip = FakePip()
    Environments(tmp_path, run=pip).ensure(RECIPE)
    assert pip.commands


def test_what_cannot_be_imported_is_not_installed(tmp_path):
    recipe = Recipe("peer", RECIPE.steps, module="peer_module")
    with pytest.raises(PeerError, match="it failed"):
        Environments(tmp_path, run=FakePip("import peer_module")).ensure(recipe)
    with pytest.raises(PeerError, match="--no-install"):
        Environments(tmp_path, run=FakePip(), may_install=False).ensure(recipe)


def test_a_compiler_that_is_missing_is_named(tmp_path):
    recipe = Recipe("peer", RECIPE.steps, programs=("no-such-compiler",))
    with pytest.raises(PeerError, match="no-such-compiler"):
        Environments(tmp_path, run=FakePip()).ensure(recipe)


@pytest.mark.parametrize(
    ("code", "limit_s", "message"),
    [("print('why'); raise SystemExit(3)", 60.0, r"ended with 3 .*\nwhy"), ("input()", 0.01, "after 0 s")],
)
def test_a_command_that_fails_is_quoted(tmp_path, code, limit_s, message):
    with pytest.raises(PeerError, match=message):
        run_logged((sys.executable, "-c", code), {}, tmp_path / "log", limit_s)
